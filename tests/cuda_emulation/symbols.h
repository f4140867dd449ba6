// The symbols of this library or program, from its file: kernels get their names back, and static
// __shared__ arrays, which only a mark in their names tells from other variables, can be found.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#ifdef CUDA_EMULATION_MEMCHECK
#include <valgrind/memcheck.h>
#endif

namespace cuda_emulation {

struct Symbol {
  std::string name;  // mangled
  unsigned char* address;
  size_t size;
  bool function;
};

inline std::vector<Symbol> read_symbols() {
  Dl_info own{};
  dladdr(reinterpret_cast<void*>(&read_symbols), &own);
  std::string bytes;
  std::FILE* file = std::fopen(own.dli_fname, "rb");
  if (!file) throw std::runtime_error("own symbols: cannot be read");
  std::fseek(file, 0, SEEK_END);
  bytes.resize(size_t(std::ftell(file)));
  std::rewind(file);
  const size_t got = std::fread(bytes.data(), 1, bytes.size(), file);
  std::fclose(file);
  if (got != bytes.size()) throw std::runtime_error("own symbols: cannot be read");
  const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header.e_shoff);
  auto* base = header.e_type == ET_DYN ? static_cast<unsigned char*>(own.dli_fbase) : nullptr;
  std::vector<Symbol> symbols;
  for (int i = 0; i < header.e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    const auto* first = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
    for (size_t j = 0; j < sections[i].sh_size / sizeof(Elf64_Sym); ++j) {
      const int type = ELF64_ST_TYPE(first[j].st_info);
      if (first[j].st_shndx == SHN_UNDEF || (type != STT_FUNC && type != STT_OBJECT)) continue;
      symbols.push_back(
          {names + first[j].st_name, base + first[j].st_value, first[j].st_size, type == STT_FUNC});
    }
  }
  return symbols;
}

inline const std::vector<Symbol>& symbols() {
  static const std::vector<Symbol> found = read_symbols();
  return found;
}

inline std::string function_name(const void* address) {
  for (const Symbol& symbol : symbols()) {
    if (!symbol.function || symbol.address != address) continue;
    char* readable = abi::__cxa_demangle(symbol.name.c_str(), nullptr, nullptr, nullptr);
    const std::string name = readable ? readable : symbol.name;
    std::free(readable);
    return name;
  }
  return "?";
}

inline const std::vector<Symbol>& static_shared() {
  static const std::vector<Symbol> found = [] {
    std::vector<Symbol> arrays;
    for (const Symbol& symbol : symbols()) {
      const std::string_view name = symbol.name;
      if (!symbol.function && !name.starts_with("_ZGV") && name.ends_with("B11cuda_shared")) {
        arrays.push_back(symbol);
      }
    }
    return arrays;
  }();
  return found;
}

inline void poison_static_shared() {
  for (const Symbol& array : static_shared()) {
    volatile unsigned char* bytes = array.address;
    for (size_t i = 0; i < array.size; ++i) bytes[i] = 0xFF;
#ifdef CUDA_EMULATION_MEMCHECK
    VALGRIND_MAKE_MEM_UNDEFINED(array.address, array.size);
#endif
  }
}

inline bool static_shared_is_poison() {
  for (const Symbol& array : static_shared()) {
    for (size_t i = 0; i < array.size; ++i) {
      if (array.address[i] != 0xFF) return false;
    }
  }
  return true;
}

}  // namespace cuda_emulation
