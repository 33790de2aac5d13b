// tokenmill._native.Sampler: one call a step for all rows that sample, the GIL released.
#include "kernels/sampler.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/philox.h"

namespace nb = nanobind;
using namespace tokenmill;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// What the sampler has to know of one output.
struct TokenHistory {
  const SamplerSettings& settings;
  std::vector<int32_t> tokens;
  int32_t prompt_tokens;

  TokenHistory(const SamplerSettings& own, const Ids& ids, int32_t prompt)
      : settings(own), tokens(ids.data(), ids.data() + ids.shape(0)), prompt_tokens(prompt) {
    if (prompt < 0 || static_cast<size_t>(prompt) > tokens.size()) {
      throw nb::value_error("prompt_tokens exceeds the sequence's tokens");
    }
  }
};

// A copy of tokens [begin, end).
nb::object copy_tokens(const TokenHistory& history, size_t begin, size_t end) {
  if (begin > end || end > history.tokens.size()) throw nb::index_error("tokens outside of the history");
  auto copied = std::make_unique<std::vector<int32_t>>(history.tokens.begin() + static_cast<ptrdiff_t>(begin),
                                                       history.tokens.begin() + static_cast<ptrdiff_t>(end));
  const size_t shape[1] = {end - begin};
  int32_t* data = copied->data();
  nb::capsule owner(copied.release(), [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, int32_t>(data, 1, shape, owner));
}

void check_ids(const int32_t* ids, size_t count, int64_t vocabulary, const char* what) {
  for (size_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      throw nb::value_error((std::string(what) + " holds token " + std::to_string(ids[i]) + ", outside of 0.." +
                             std::to_string(vocabulary - 1)).c_str());
    }
  }
}

const float* row_of(const Logits& logits, int32_t row, const Sampler& sampler) {
  if (static_cast<int64_t>(logits.shape(1)) != sampler.vocabulary()) {
    throw nb::value_error(("logits have " + std::to_string(logits.shape(1)) + " columns, the vocabulary " +
                           std::to_string(sampler.vocabulary()) + " tokens").c_str());
  }
  if (row < 0 || static_cast<size_t>(row) >= logits.shape(0)) {
    throw nb::value_error(("row " + std::to_string(row) + " is not among " + std::to_string(logits.shape(0)) + " rows of logits").c_str());
  }
  return logits.data() + static_cast<size_t>(row) * logits.shape(1);
}

// What a call found, row by row; filled while the GIL is released. Python objects are made of what is asked for: most
// steps want the ids and nothing else.
class Samples {
 public:
  // `widths` holds how many best tokens each row wants.
  explicit Samples(const std::vector<int32_t>& widths) : tokens(widths.size()), best(widths.size()) {
    const auto total = static_cast<size_t>(std::accumulate(widths.begin(), widths.end(), int64_t{0}));
    best_ids_.assign(total, -1);
    best_logprobs_.resize(total);
    size_t start = 0;
    for (size_t row = 0; row < widths.size(); ++row) {
      best[row] = {best_ids_.data() + start, best_logprobs_.data() + start, widths[row]};
      start += static_cast<size_t>(widths[row]);
    }
  }
  Samples(const Samples&) = delete;
  Samples(Samples&&) = default;  // the vectors' memory stays where `best` points

  std::vector<int32_t> ids() const {
    return each([](const SampledToken& token) { return token.status == RowStatus::kOk ? token.id : -1; });
  }
  // Whether the ids are all that there is to know.
  bool plain() const {
    const auto usable = [](const SampledToken& token) { return token.status == RowStatus::kOk; };
    return !with_logprobs && std::all_of(tokens.begin(), tokens.end(), usable);
  }
  std::vector<int32_t> status() const {
    return each([](const SampledToken& token) { return static_cast<int32_t>(token.status); });
  }
  std::tuple<float, int32_t, std::vector<std::pair<int32_t, float>>> logprobs(size_t row) const {
    if (row >= tokens.size()) throw nb::index_error("no such row");
    std::vector<std::pair<int32_t, float>> pairs;
    for (int32_t i = 0; i < best[row].n && best[row].ids[i] >= 0; ++i) pairs.emplace_back(best[row].ids[i], best[row].logprobs[i]);
    return {tokens[row].logprob, tokens[row].rank, std::move(pairs)};
  }

  std::vector<SampledToken> tokens;
  std::vector<BestTokens> best;
  bool with_logprobs = false;

 private:
  template <class Get>
  std::vector<int32_t> each(const Get& get) const {
    std::vector<int32_t> found(tokens.size());
    std::transform(tokens.begin(), tokens.end(), found.begin(), get);
    return found;
  }

  std::vector<int32_t> best_ids_;
  std::vector<float> best_logprobs_;
};

Samples sample(Sampler& sampler, const Logits& logits, const std::vector<int32_t>& rows,
               const std::vector<const TokenHistory*>& histories, const std::vector<std::optional<Ids>>& masks) {
  const size_t count = rows.size();
  if (histories.size() != count) throw nb::value_error("rows and histories must have the same length");
  if (!masks.empty() && masks.size() != count) throw nb::value_error("masks must be empty or as long as rows");
  const auto mask_words = static_cast<size_t>((sampler.vocabulary() + 31) / 32);
  std::vector<SampleRow> work(count);
  std::vector<int32_t> widths(count);
  bool with_logprobs = false;
  for (size_t i = 0; i < count; ++i) {
    if (histories[i] == nullptr) throw nb::value_error("histories holds None");
    const TokenHistory& history = *histories[i];
    const SamplerSettings& own = history.settings;
    check_ids(own.bias_ids.data(), own.bias_ids.size(), sampler.vocabulary(), "logit_bias");
    check_ids(own.end_ids.data(), own.end_ids.size(), sampler.vocabulary(), "the set of end tokens");
    for (const auto& word : own.bad_words) check_ids(word.data(), word.size(), sampler.vocabulary(), "bad_words");
    if (own.penalizes()) check_ids(history.tokens.data(), history.tokens.size(), sampler.vocabulary(), "the sequence");
    work[i] = {row_of(logits, rows[i], sampler), &own, history.tokens, history.prompt_tokens};
    if (!masks.empty() && masks[i]) {
      if (masks[i]->shape(0) != mask_words) {
        throw nb::value_error(("a mask has " + std::to_string(masks[i]->shape(0)) + " words, the vocabulary takes " +
                               std::to_string(mask_words)).c_str());
      }
      work[i].mask = {masks[i]->data(), mask_words};
    }
    widths[i] = std::max(own.logprobs, 0);
    with_logprobs = with_logprobs || own.logprobs >= 0;
  }
  Samples samples(widths);
  samples.with_logprobs = with_logprobs;
  const nb::gil_scoped_release release;
  sampler.sample(work, samples.tokens, samples.best);
  return samples;
}

std::variant<std::vector<int32_t>, Samples> pick(Sampler& sampler, const Logits& logits, const std::vector<int32_t>& rows,
                                                 const std::vector<const TokenHistory*>& histories,
                                                 const std::vector<std::optional<Ids>>& masks) {
  Samples samples = sample(sampler, logits, rows, histories, masks);
  if (samples.plain()) return samples.ids();
  return samples;
}

Samples score(Sampler& sampler, const Logits& logits, const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
              int32_t best) {
  const size_t count = rows.size();
  if (targets.size() != count) throw nb::value_error("rows and targets must have the same length");
  if (best < 0) throw nb::value_error("best must not be negative");
  check_ids(targets.data(), count, sampler.vocabulary(), "targets");
  std::vector<const float*> work(count);
  for (size_t i = 0; i < count; ++i) work[i] = row_of(logits, rows[i], sampler);
  Samples samples(std::vector<int32_t>(count, best));
  const nb::gil_scoped_release release;
  sampler.score(work, targets, samples.tokens, samples.best);
  return samples;
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<SamplerSettings>(m, "SamplerSettings", "One request's sampling parameters, converted once.")
      .def("__init__",
           [](SamplerSettings* self, float temperature, int32_t top_k, double top_p, float min_p, double typical_p,
              float repetition_penalty, float presence_penalty, float frequency_penalty, uint64_t seed,
              uint32_t sample_index, int32_t min_tokens, std::vector<int32_t> end_ids, std::vector<int32_t> bias_ids,
              std::vector<float> biases, std::vector<uint32_t> allowed, std::vector<std::vector<int32_t>> bad_words,
              int32_t logprobs) {
             for (const auto& word : bad_words) {
               if (word.empty()) throw nb::value_error("bad_words holds a sequence without tokens");
             }
             if (bias_ids.size() != biases.size()) throw nb::value_error("bias_ids and biases must have the same length");
             if (temperature != 0.0f && !(temperature >= 1e-3f && temperature <= 1e6f)) {
               throw nb::value_error("temperature must be 0 or lie in 0.001..1000000");
             }
             new (self) SamplerSettings{temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty,
                                        frequency_penalty, seed, sample_index, min_tokens, std::move(end_ids),
                                        std::move(bias_ids), std::move(biases), std::move(allowed),
                                        std::move(bad_words), logprobs};
           },
           nb::kw_only(), nb::arg("temperature") = 1.0f, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0f,
           nb::arg("typical_p") = 1.0, nb::arg("repetition_penalty") = 1.0f, nb::arg("presence_penalty") = 0.0f,
           nb::arg("frequency_penalty") = 0.0f, nb::arg("seed") = 0, nb::arg("sample_index") = 0, nb::arg("min_tokens") = 0,
           nb::arg("end_ids") = std::vector<int32_t>{}, nb::arg("bias_ids") = std::vector<int32_t>{},
           nb::arg("biases") = std::vector<float>{}, nb::arg("allowed") = std::vector<uint32_t>{},
           nb::arg("bad_words") = std::vector<std::vector<int32_t>>{}, nb::arg("logprobs") = -1);

  nb::class_<TokenHistory>(m, "TokenHistory", "One output as the sampler sees it: its settings, and prompt and output so far.")
      .def(nb::init<const SamplerSettings&, const Ids&, int32_t>(), nb::arg("settings"), nb::arg("tokens"),
           nb::arg("prompt_tokens"), nb::keep_alive<1, 2>())
      .def("append", [](TokenHistory& self, int32_t token) { self.tokens.push_back(token); }, nb::arg("token"))
      .def("__len__", [](const TokenHistory& self) { return self.tokens.size(); })
      .def("copy", &copy_tokens, nb::arg("begin"), nb::arg("end"), "Tokens begin .. end - 1. Raises IndexError.");

  nb::class_<Samples>(m, "Samples", "What a sampler found, one entry for each row that it was given.")
      .def_prop_ro("ids", &Samples::ids, "The picked (or given) tokens; -1 where a row cannot be used.")
      .def_prop_ro("status", &Samples::status, "0, 1 (NaN or infinity in the row) or 2 (nothing may be picked).")
      .def("logprobs", &Samples::logprobs, nb::arg("row"),
           "Where they were wanted: the token's log-probability and rank, and the best tokens with theirs, most likely\n"
           "first. Of the logits as given. Raises IndexError.");

  nb::class_<Sampler>(m, "Sampler", "Picks tokens from rows of logits; one caller at a time.")
      .def(nb::init<int64_t, std::shared_ptr<ThreadPool>>(), nb::arg("vocabulary"), nb::arg("pool"))
      .def_prop_ro("scratch_bytes", &Sampler::scratch_bytes)
      .def("sample", &sample, nb::arg("logits"), nb::arg("rows"), nb::arg("histories"), nb::arg("masks") = std::vector<std::optional<Ids>>{},
           "One token for each element of `rows`, which are rows of `logits` [rows, vocabulary].\n\n"
           "`masks` is empty, or holds for each row None or one bit a token (int32, bit i % 32 of word i / 32): those\n"
           "without a bit cannot be picked.")
      .def("pick", &pick, nb::arg("logits"), nb::arg("rows"), nb::arg("histories"), nb::arg("masks") = std::vector<std::optional<Ids>>{},
           "Like `sample`; only the ids where there is no more to know: no log-probabilities, and no row that is unusable.")
      .def("score", &score, nb::arg("logits"), nb::arg("rows"), nb::arg("targets"), nb::arg("best") = 0,
           "Like `sample`, for given tokens: log-probability and rank of targets[i] in row rows[i], and its best tokens.");

  m.def("draw_words", [](uint64_t seed, uint32_t sample_index, uint32_t position, uint32_t purpose) {
    const PhiloxWords words = draw_words(seed, sample_index, position, static_cast<DrawPurpose>(purpose));
    return std::vector<uint32_t>(words.begin(), words.end());
  }, nb::arg("seed"), nb::arg("sample_index"), nb::arg("position"), nb::arg("purpose") = 0,
        "Four random words of Philox4x32-10 for one draw.");
}
