// The Python module `_C`: what was built. It names no op and needs no torch.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of pyvision_kernels.";
  m.def("build_info", [] { return PVK_BUILD_INFO; }, "A JSON object: torch, compiler, cuda, cuda_archs, cpu_isas.");
}
