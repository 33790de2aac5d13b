// tokenmill._native.Sampler: one call a step for all rows that sample, the GIL released.
#include "kernels/sampler.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>

#include "kernels/philox.h"

namespace nb = nanobind;
using namespace tokenmill;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
struct OwnedArray {
  T* data;
  nb::object array;
};

template <class T>
OwnedArray<T> new_array(std::vector<size_t> shape) {
  size_t count = 1;
  for (const size_t extent : shape) count *= extent;
  T* data = new T[count == 0 ? 1 : count]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return {data, nb::cast(nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner))};
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

// The result arrays of a call; filled while the GIL is released.
struct Results {
  std::vector<SampledToken> tokens;
  std::vector<BestTokens> best;
  OwnedArray<int32_t> best_ids;
  OwnedArray<float> best_logprobs;

  Results(size_t rows, int32_t n)
      : tokens(rows),
        best(rows),
        best_ids(new_array<int32_t>({rows, static_cast<size_t>(n)})),
        best_logprobs(new_array<float>({rows, static_cast<size_t>(n)})) {
    std::fill_n(best_ids.data, rows * static_cast<size_t>(n), -1);
    for (size_t row = 0; row < rows; ++row) {
      const size_t start = row * static_cast<size_t>(n);
      best[row] = {best_ids.data + start, best_logprobs.data + start, n};
    }
  }

  nb::tuple as_arrays() const {
    const size_t rows = tokens.size();
    auto ids = new_array<int32_t>({rows}), status = new_array<int32_t>({rows}), ranks = new_array<int32_t>({rows});
    auto logprobs = new_array<float>({rows});
    for (size_t row = 0; row < rows; ++row) {
      ids.data[row] = tokens[row].id;
      status.data[row] = static_cast<int32_t>(tokens[row].status);
      logprobs.data[row] = tokens[row].logprob;
      ranks.data[row] = tokens[row].rank;
    }
    return nb::make_tuple(ids.array, status.array, logprobs.array, ranks.array, best_ids.array, best_logprobs.array);
  }
};

nb::tuple sample(Sampler& sampler, const Logits& logits, const Ids& rows, const std::vector<const SamplerSettings*>& settings,
                 const std::vector<Ids>& tokens, const Ids& prompt_tokens, const std::vector<std::optional<Ids>>& masks) {
  const size_t count = rows.shape(0);
  if (settings.size() != count || tokens.size() != count || prompt_tokens.shape(0) != count) {
    throw nb::value_error("rows, settings, tokens and prompt_tokens must have the same length");
  }
  if (!masks.empty() && masks.size() != count) throw nb::value_error("masks must be empty or as long as rows");
  const auto mask_words = static_cast<size_t>((sampler.vocabulary() + 31) / 32);
  std::vector<SampleRow> work(count);
  int32_t widest = 0;
  for (size_t i = 0; i < count; ++i) {
    if (settings[i] == nullptr) throw nb::value_error("settings holds None");
    const SamplerSettings& own = *settings[i];
    const std::span<const int32_t> history(tokens[i].data(), tokens[i].shape(0));
    check_ids(own.bias_ids.data(), own.bias_ids.size(), sampler.vocabulary(), "logit_bias");
    check_ids(own.end_ids.data(), own.end_ids.size(), sampler.vocabulary(), "the set of end tokens");
    for (const auto& word : own.bad_words) check_ids(word.data(), word.size(), sampler.vocabulary(), "bad_words");
    if (own.penalizes()) check_ids(history.data(), history.size(), sampler.vocabulary(), "the sequence");
    if (prompt_tokens.data()[i] < 0 || static_cast<size_t>(prompt_tokens.data()[i]) > history.size()) {
      throw nb::value_error("prompt_tokens exceeds the sequence's tokens");
    }
    work[i] = {row_of(logits, rows.data()[i], sampler), &own, history, prompt_tokens.data()[i]};
    if (!masks.empty() && masks[i]) {
      if (masks[i]->shape(0) != mask_words) {
        throw nb::value_error(("a mask has " + std::to_string(masks[i]->shape(0)) + " words, the vocabulary takes " +
                               std::to_string(mask_words)).c_str());
      }
      work[i].mask = {masks[i]->data(), mask_words};
    }
    widest = std::max(widest, own.logprobs);
  }
  Results results(count, widest);
  for (size_t i = 0; i < count; ++i) results.best[i].n = std::max(settings[i]->logprobs, 0);
  {
    const nb::gil_scoped_release release;
    sampler.sample(work, results.tokens, results.best);
  }
  return results.as_arrays();
}

nb::tuple score(Sampler& sampler, const Logits& logits, const Ids& rows, const Ids& targets, int32_t best) {
  const size_t count = rows.shape(0);
  if (targets.shape(0) != count) throw nb::value_error("rows and targets must have the same length");
  if (best < 0) throw nb::value_error("best must not be negative");
  check_ids(targets.data(), count, sampler.vocabulary(), "targets");
  std::vector<const float*> work(count);
  for (size_t i = 0; i < count; ++i) work[i] = row_of(logits, rows.data()[i], sampler);
  Results results(count, best);
  {
    const nb::gil_scoped_release release;
    sampler.score(work, {targets.data(), count}, results.tokens, results.best);
  }
  return results.as_arrays();
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

  nb::class_<Sampler>(m, "Sampler", "Picks tokens from rows of logits; one caller at a time.")
      .def(nb::init<int64_t, int>(), nb::arg("vocabulary"), nb::arg("threads") = 1)
      .def_prop_ro("scratch_bytes", &Sampler::scratch_bytes)
      .def("sample", &sample, nb::arg("logits"), nb::arg("rows"), nb::arg("settings"), nb::arg("tokens"), nb::arg("prompt_tokens"),
           nb::arg("masks") = std::vector<std::optional<Ids>>{},
           "Returns (ids, status, logprobs, ranks, best_ids, best_logprobs), each with one entry per element of `rows`.\n\n"
           "`tokens` holds each sequence's prompt and output so far (int32). Status is 0, 1 (NaN or infinity in the row)\n"
           "or 2 (nothing may be picked). Log-probabilities are of the logits as given. `masks` is empty, or holds for each\n"
           "row None or one bit a token (int32, bit i % 32 of word i / 32): those without a bit cannot be picked.")
      .def("score", &score, nb::arg("logits"), nb::arg("rows"), nb::arg("targets"), nb::arg("best") = 0,
           "Like `sample`, for given tokens: log-probability and rank of targets[i] in row rows[i], and its best tokens.");

  m.def("draw_words", [](uint64_t seed, uint32_t sample_index, uint32_t position, uint32_t purpose) {
    const PhiloxWords words = draw_words(seed, sample_index, position, static_cast<DrawPurpose>(purpose));
    return std::vector<uint32_t>(words.begin(), words.end());
  }, nb::arg("seed"), nb::arg("sample_index"), nb::arg("position"), nb::arg("purpose") = 0,
        "Four random words of Philox4x32-10 for one draw.");
}
