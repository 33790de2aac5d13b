// tokenmill._native.Bpe: a merge-list tokenizer model over tables that Python holds.
#include "tokenizer/bpe.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenmill;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pairs = nb::ndarray<const int32_t, nb::shape<-1, 2>, nb::c_contig, nb::device::cpu>;

template <class T>
std::span<const T> as_span(const Array<T>& array) {
  return {array.data(), array.shape(0)};
}

constexpr size_t kMergeWords = sizeof(BpeMerge) / sizeof(uint32_t);

// The model, and the arrays that keep its memory alive.
struct BoundBpe {
  Bpe bpe;
  Array<uint8_t> text;
  Array<uint32_t> starts, token_slots, merge_slots;
};

BpeTables tables_of(const Array<uint8_t>& text, const Array<uint32_t>& starts, const Array<uint32_t>& token_slots,
                    const Array<uint32_t>& merge_slots) {
  return {as_span(text), as_span(starts), as_span(token_slots),
          {reinterpret_cast<const BpeMerge*>(merge_slots.data()), merge_slots.shape(0) / kMergeWords}};
}

std::string_view as_view(nb::handle text) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data == nullptr) throw nb::python_error();
  return {data, static_cast<size_t>(size)};
}

nb::object words(std::vector<uint32_t>&& values) {
  auto* own = new std::vector<uint32_t>(std::move(values));
  nb::capsule owner(own, [](void* p) noexcept { delete static_cast<std::vector<uint32_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, uint32_t>(own->data(), {own->size()}, owner));
}

nb::tuple index_tables(const Array<uint8_t>& text, const Array<uint32_t>& starts, const Array<uint8_t>& findable, const Pairs& merges) {
  if (starts.shape(0) == 0 || findable.shape(0) != starts.shape(0) - 1) {
    throw nb::value_error("starts must have one entry more than findable");
  }
  BpeTables tables{as_span(text), as_span(starts), {}, {}};
  std::vector<uint32_t> token_slots(bpe_slots(tables.tokens()));
  index_tokens(tables, as_span(findable), token_slots);
  tables.token_slots = token_slots;
  std::vector<uint32_t> merge_slots(bpe_slots(merges.shape(0)) * kMergeWords);
  const std::span<BpeMerge> slots{reinterpret_cast<BpeMerge*>(merge_slots.data()), merge_slots.size() / kMergeWords};
  const int64_t bad = index_merges(tables, {merges.data(), 2 * merges.shape(0)}, slots);
  if (bad >= 0) throw nb::value_error(("merge " + std::to_string(bad) + " joins to a text that is no token").c_str());
  return nb::make_tuple(words(std::move(token_slots)), words(std::move(merge_slots)));
}

nb::list encode(const BoundBpe& self, const nb::list& fragments) {
  std::vector<std::string_view> texts;
  texts.reserve(fragments.size());
  for (nb::handle fragment : fragments) texts.push_back(as_view(fragment));
  std::vector<int32_t> ids;
  {
    const nb::gil_scoped_release release;  // the caller's list keeps the strings
    for (const std::string_view text : texts) self.bpe.encode(text, ids);
  }
  nb::list result;
  for (const int32_t id : ids) result.append(id);
  return result;
}

}  // namespace

void bind_bpe(nb::module_& m) {
  m.def("index_bpe", &index_tables, "text"_a, "starts"_a, "findable"_a, "merges"_a,
        "Hash tables of a vocabulary: (token_slots, merge_slots), uint32 each, for Bpe.\n\n"
        "`text` holds the spellings one after the other, `starts` [tokens + 1] where each begins; `findable` [tokens] is 0\n"
        "for tokens that text never becomes; `merges` [merges, 2] holds ids, best merge first. Raises ValueError for a\n"
        "merge that joins to no token.");
  nb::class_<BoundBpe>(m, "Bpe", "Byte-pair encoding over a vocabulary's tables. Safe to use from many threads.")
      .def("__init__",
           [](BoundBpe* self, const Array<uint8_t>& text, const Array<uint32_t>& starts, const Array<uint32_t>& token_slots,
              const Array<uint32_t>& merge_slots, bool ignore_merges, bool byte_fallback, std::optional<int64_t> unknown) {
             const BpeOptions options{ignore_merges, byte_fallback, unknown.value_or(-1)};
             new (self) BoundBpe{Bpe(tables_of(text, starts, token_slots, merge_slots), options), text, starts, token_slots, merge_slots};
           },
           // A converted array would be a copy of the whole table.
           "text"_a.noconvert(), "starts"_a.noconvert(), "token_slots"_a.noconvert(), "merge_slots"_a.noconvert(), "ignore_merges"_a, "byte_fallback"_a, "unknown"_a.none())
      .def("find", [](const BoundBpe& self, nb::str text) -> std::optional<int64_t> {
        const int64_t id = self.bpe.find(as_view(text));
        return id < 0 ? std::nullopt : std::optional<int64_t>(id);
      }, "text"_a, "The id of a token by its spelling, or None.")
      .def("encode", &encode, "fragments"_a, "The ids of texts that do not merge with each other, without the GIL.");
}
