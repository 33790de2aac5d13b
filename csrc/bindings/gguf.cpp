// tokenmill._native.skip_strings: the one loop over a GGUF header that is as long as the vocabulary.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int64_t skip_strings(const Bytes& data, uint64_t position, uint64_t count) {
  const uint64_t size = data.shape(0);
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t length;
    if (position > size || size - position < sizeof length) return -1;
    std::memcpy(&length, data.data() + position, sizeof length);
    position += sizeof length;
    if (length > size - position) return -1;
    position += length;
  }
  return static_cast<int64_t>(position);
}

}  // namespace

void bind_gguf(nb::module_& m) {
  m.def("skip_strings", &skip_strings, "data"_a, "position"_a, "count"_a,
        "Where `count` GGUF strings that begin at `position` end; -1 if that is beyond the data.");
}
