// selfgen::_cpu_level: which level of x86 the kernels of this process use, for tests and reports.

#include "level.h"

#include <torch/library.h>

#include <string>

namespace {

std::string cpu_level() { return kIsaNames[int(kIsa)]; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfgen, m) { m.def("_cpu_level() -> str", cpu_level); }
