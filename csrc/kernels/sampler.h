// Picks the next token of each row of logits, and reads log-probabilities.
//
// Everything is a function of the row, the request's settings and its tokens: the same bits on every instruction-set
// path, for every batch and thread count. Ties are won by the lower id, everywhere.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "platform/thread_pool.h"

namespace tokenmill {

// One request's parameters, in the order in which they act on a row: what may be picked at all (allowed tokens, the
// row's mask, bad words), logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p, typical_p. Meanings are vLLM's; typical_p is Meister et al., "Locally typical sampling", 2022.
struct SamplerSettings {
  float temperature = 1.0f;  // 0 is greedy: the filters below do not matter then
  int32_t top_k = 0;         // 0 keeps all
  double top_p = 1.0;        // smallest set of most likely tokens with at least this mass; 0 keeps the best only
  float min_p = 0.0f;        // at least this times the best probability
  double typical_p = 1.0;    // mass of tokens whose information is nearest to the entropy
  float repetition_penalty = 1.0f;  // divides positive and multiplies negative logits of tokens in prompt and output
  float presence_penalty = 0.0f;    // subtracted once from tokens in the output
  float frequency_penalty = 0.0f;   // subtracted per occurrence in the output
  uint64_t seed = 0;
  uint32_t sample_index = 0;
  int32_t min_tokens = 0;            // output tokens before which `end_ids` cannot be picked
  std::vector<int32_t> end_ids;
  std::vector<int32_t> bias_ids;
  std::vector<float> biases;
  std::vector<uint32_t> allowed;  // bit i % 32 of word i / 32: token i may be picked; what lies beyond may not. Empty: all
  std::vector<std::vector<int32_t>> bad_words;  // token sequences of which the output must not complete one
  int32_t logprobs = -1;  // -1: none; n: the picked token's and the n best, of the row as the model gave it

  bool penalizes() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
};

struct SampleRow {
  const float* logits;  // [vocabulary]
  const SamplerSettings* settings;
  std::span<const int32_t> tokens;  // prompt, then output so far; their count is the drawn token's position
  int32_t prompt_tokens;
  std::span<const int32_t> mask = {};  // like `allowed`, for this token only; empty: all
};

enum class RowStatus : int32_t {
  kOk = 0,
  kNotFinite = 1,       // the row holds NaN or +infinity
  kNothingAllowed = 2,  // every logit is -infinity after biases and masks
};

struct SampledToken {
  int32_t id = -1;
  RowStatus status = RowStatus::kOk;
  float logprob = 0.0f;  // only where log-probabilities are wanted
  int32_t rank = 0;      // 1 + number of more likely tokens; only where log-probabilities are wanted
};

// The n best of a row, most likely first; unused places hold id -1.
struct BestTokens {
  int32_t* ids;
  float* logprobs;
  int32_t n;
};

class Sampler {
 public:
  // The pool's threads share the rows of a call. Throws std::invalid_argument for an empty vocabulary.
  Sampler(int64_t vocabulary, std::shared_ptr<ThreadPool> pool);
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  int64_t vocabulary() const { return vocabulary_; }
  // Bytes of working memory, all threads.
  int64_t scratch_bytes() const;

  // Fills out[r] for every row; best[r] for rows that want log-probabilities. All ids in settings and tokens must lie
  // in 0..vocabulary - 1.
  void sample(std::span<const SampleRow> rows, std::span<SampledToken> out, std::span<const BestTokens> best);

  // Log-probability and rank of targets[r] in rows[r], and that row's best tokens.
  void score(std::span<const float* const> rows, std::span<const int32_t> targets, std::span<SampledToken> out,
             std::span<const BestTokens> best);

 private:
  class Worker;
  template <class PerRow>
  void for_rows(int64_t rows, const PerRow& per_row);

  int64_t vocabulary_;
  std::shared_ptr<ThreadPool> pool_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace tokenmill
