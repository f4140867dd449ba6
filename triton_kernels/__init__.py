"""Triton kernels of the ops, one launcher `<op>` a file; contracts stand in `prunelm/ops/<op>.py`.

The launchers take what the ops have checked: contiguous tensors of one device. On CPU tensors they
run where TRITON_INTERPRET=1 was set before triton was imported, in float32. Nothing here is
imported before a kernel is asked for.
"""
