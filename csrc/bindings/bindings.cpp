// The Python module tokenmill._native. Each part of csrc binds itself in a file of its own.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "platform/isa.h"
#include "platform/thread_pool.h"

namespace nb = nanobind;
using namespace tokenmill;

namespace {

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_name(static_cast<Isa>(i)) == name) return static_cast<Isa>(i);
  }
  throw nb::value_error(("unknown instruction-set path: " + name).c_str());
}

}  // namespace

void bind_bpe(nb::module_& m);
void bind_executor(nb::module_& m);
void bind_gguf(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_pointwise(nb::module_& m);
void bind_roofline(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_thread_pool(nb::module_& m);

NB_MODULE(_native, m) {
  m.doc() = "Tokenmill's CPU kernels and program executor.";
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); }, "Name of the instruction-set path in use.");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kIsaCount; ++i) {
      if (isa_available(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    }
    return names;
  }, "Names of the paths that this processor can run, slowest first.");
  m.def("set_active_isa", [](const std::string& name) { set_active_isa(isa_from_name(name)); },
        "Switches the path in use, for tests and benchmarks. Not while a step runs.");
  m.def("usable_cpu_count", &usable_cpu_count, "Threads allowed by the affinity mask and the cgroup's CPU quota.");
  bind_thread_pool(m);  // executor and sampler take one
  bind_bpe(m);
  bind_executor(m);
  bind_gguf(m);
  bind_linear(m);
  bind_pointwise(m);
  bind_roofline(m);
  bind_sampler(m);
}
