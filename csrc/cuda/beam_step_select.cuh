// How the threads of a team find the best of many candidates together: each thread looks at its
// pieces once, what its best ones are bounds what the winners are, and only threads that can hold a
// winner are looked at again.
#pragma once

#include "cuda/device.cuh"

namespace prunelm::cuda {

constexpr int kPiece = 4;  // neighbouring candidates that a thread looks at together
constexpr int kFew = 128;  // candidates that are ranked without a look at bounds
constexpr uint32_t kNowhere = UINT32_MAX;

// A total and where it stands, for which lower wins a tie. Nobody: -inf.
template <typename S>
struct alignas(2 * sizeof(S)) Candidate {
  S total;
  uint32_t at;

  __device__ bool before(const Candidate& other) const {
    return total > other.total || (total == other.total && at < other.at);
  }
  __device__ bool live() const { return total > -S(INFINITY); }
};

template <typename S>
__device__ Candidate<S> no_candidate() {
  return {-S(INFINITY), kNowhere};
}

// The threads that share a row: a warp, or the thread block.
struct WarpTeam {
  static constexpr bool kOneWarp = true;
  static constexpr int kListed = kFew;
  __device__ int thread() const { return int(threadIdx.x % kWarp); }
  __device__ int size() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }
};
struct BlockTeam {
  static constexpr bool kOneWarp = false;
  static constexpr int kListed = 512;
  __device__ int thread() const { return int(threadIdx.x); }
  __device__ int size() const { return int(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }
};

// Hands out shared memory, 16 bytes aligned; from nullptr it counts bytes.
struct Carver {
  unsigned char* base;
  int64_t bytes = 0;

  template <typename T>
  __host__ __device__ T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(base + bytes);
    bytes += (count * int64_t{sizeof(T)} + 15) / 16 * 16;
    return taken;
  }
};

// What a team's selection shares.
template <typename S>
struct Selection {
  struct Found {
    Candidate<S> bound;  // no winner comes behind it
    uint32_t threads, listed;
  };
  Found* found;
  Candidate<S>* highest;  // [threads]: of each thread, then of each group of threads
  Candidate<S>* list;     // [Team::kListed]
  Candidate<S>* best;     // [count]: the winners, best first, then nobody
  uint32_t* threads;      // [threads] that can hold a winner

  __host__ __device__ Selection(Carver& shared, int threads_, int listed, int64_t count) {
    found = shared.take<Found>(1);
    highest = shared.take<Candidate<S>>(threads_);
    list = shared.take<Candidate<S>>(listed);
    best = shared.take<Candidate<S>>(count);
    threads = shared.take<uint32_t>(threads_);
  }
};

// Sets the bound to the count-th best of what groups of threads have as their best, where there
// are as many: the groups hold at least `count` that are no worse.
template <typename Team, typename S>
__device__ void set_bound(Team team, const Selection<S>& shared, int count, Candidate<S> mine) {
  const int thread = team.thread(), threads = team.size();
  const int groups = min(threads, max(kWarp, 4 * count));
  if (groups < threads) {
    if (thread < groups) {
      for (int i = thread + groups; i < threads; i += groups) {
        if (shared.highest[i].before(mine)) mine = shared.highest[i];
      }
      shared.highest[thread] = mine;
    }
    team.sync();
  }
  if (thread < groups && mine.live()) {
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < groups; ++i) rank += shared.highest[i].before(mine);
    if (rank == count - 1) shared.found->bound = mine;
  }
  team.sync();
}

// Sorts the best `count` of the list into `best` by counting who comes before whom.
template <typename Team, typename S>
__device__ void rank_list(Team team, const Selection<S>& shared, int listed, int64_t count) {
  for (int j = team.thread(); j < listed; j += team.size()) {
    const Candidate<S> mine = shared.list[j];
    if (!mine.live()) continue;
    int64_t rank = 0;
#pragma unroll 4
    for (int i = 0; i < listed; ++i) rank += shared.list[i].before(mine);
    if (rank < count) shared.best[rank] = mine;
  }
}

// The best candidate of the team's threads, for all of them; the rounds' memory takes turns.
template <typename Team, typename S>
__device__ Candidate<S> best_of(Team team, Candidate<S> best, Candidate<S>* memory) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Candidate<S> other{__shfl_xor_sync(kAllLanes, best.total, lanes),
                             __shfl_xor_sync(kAllLanes, best.at, lanes)};
    if (other.before(best)) best = other;
  }
  if constexpr (!Team::kOneWarp) {
    const int thread = team.thread();
    if (thread % kWarp == 0) memory[thread / kWarp] = best;
    team.sync();
    for (int i = 0; i < team.size() / kWarp; ++i) {
      if (memory[i].before(best)) best = memory[i];
    }
  }
  return best;
}

// Takes any number of candidates and winners: a round a winner, each the best one that comes after
// the last, so that ties need no marks.
template <typename Team, typename Source, typename S>
__device__ void select_by_rounds(Team team, Source& source, const Selection<S>& shared,
                                 int64_t count) {
  const int thread = team.thread(), threads = team.size();
  Candidate<S> last{S(INFINITY), 0};
  for (int64_t j = 0; j < count; ++j) {
    Candidate<S> best = no_candidate<S>();
#pragma unroll 1
    for (uint32_t p = thread; p < source.pieces(); p += threads) {
      S total[kPiece];
      source.read(p, total);
      for (int k = 0; k < kPiece; ++k) {
        const Candidate<S> here{total[k], p * kPiece + k};
        if (here.live() && last.before(here) && here.before(best)) best = here;
      }
    }
    last = best_of(team, best, shared.highest + j % 2 * (threads / kWarp));
    if (thread == 0) shared.best[j] = last;
  }
}

// Lists the candidates that the bound lets pass, from the threads that hold some; says how many
// there are, which may be more than were kept.
template <typename Team, typename Source, typename S>
__device__ uint32_t list_within_bound(Team team, Source& source, const Selection<S>& shared,
                                      Candidate<S> mine) {
  const int thread = team.thread(), threads = team.size();
  const Candidate<S> bound = shared.found->bound;
  if (mine.live() && !bound.before(mine)) {
    shared.threads[atomicAdd(&shared.found->threads, 1u)] = thread;
  }
  team.sync();
  const uint32_t holders = shared.found->threads;
  const uint32_t rounds = (source.pieces() + threads - 1) / threads;
#pragma unroll 1
  for (uint32_t i = thread; i < holders * rounds; i += threads) {
    const uint32_t p = shared.threads[i % holders] + i / holders * threads;
    if (p >= source.pieces()) continue;
    S total[kPiece];
    source.read(p, total);
    for (int k = 0; k < kPiece; ++k) {
      const Candidate<S> here{total[k], p * kPiece + k};
      if (!here.live() || bound.before(here)) continue;
      const uint32_t to = atomicAdd(&shared.found->listed, 1u);
      if (to < Team::kListed) shared.list[to] = here;
    }
  }
  team.sync();
  return shared.found->listed;
}

// Puts the best `count` candidates of `source` into shared.best; the whole team calls it and sees
// them. `source.read` says what a piece's candidates are worth, the same each time, -inf where
// there is none.
template <typename Team, typename Source, typename S>
__device__ void select(Team team, Source& source, const Selection<S>& shared, int64_t count) {
  const int thread = team.thread(), threads = team.size();
  const bool few = source.pieces() <= kFew / kPiece;
  if (thread == 0) *shared.found = {no_candidate<S>(), 0, 0};
  for (int64_t j = thread; j < count; j += threads) shared.best[j] = no_candidate<S>();
  Candidate<S> mine = no_candidate<S>();
#pragma unroll 1
  for (uint32_t p = thread; p < source.pieces(); p += threads) {
    S total[kPiece];
    source.read(p, total);
    for (int k = 0; k < kPiece; ++k) {
      const Candidate<S> here{total[k], p * kPiece + k};
      if (few) shared.list[here.at] = here;
      if (here.total > mine.total) mine = here;
    }
  }
  shared.highest[thread] = mine;
  team.sync();
  uint32_t listed = source.pieces() * kPiece;
  if (!few) {
    if (count <= threads) set_bound(team, shared, int(count), mine);
    listed = list_within_bound(team, source, shared, mine);
  }
  if (listed <= Team::kListed) {
    rank_list(team, shared, int(listed), count);
  } else {
    select_by_rounds(team, source, shared, count);
  }
  team.sync();
}

}  // namespace prunelm::cuda
