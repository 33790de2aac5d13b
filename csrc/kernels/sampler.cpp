#include "kernels/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "kernels/philox.h"
#include "kernels/prefix_end.h"
#include "kernels/sampler_rows.h"
#include "platform/float_environment.h"

namespace tokenmill {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kCopiedShare = 4;  // a filter that leaves less of the row than one in so many tokens copies them
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2E = 1.44269504088896340736;

// Natural logarithm of a positive, normal double without libm, whose bits differ between machines:
// ln(m 2^e) = e ln 2 + 2 artanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)); absolute error below 1e-14.
double natural_log(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  int exponent = static_cast<int>((bits >> 52) & 0x7ffU) - 1023;
  double m = std::bit_cast<double>((bits & 0xfffffffffffffULL) | 0x3ff0000000000000ULL);
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    ++exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double series = 1.0 / 19.0;
  for (int k = 17; k >= 1; k -= 2) series = series * z + 1.0 / k;
  return exponent * kLn2 + 2.0 * s * series;
}

}  // namespace

// One thread's working memory, and the work on one row.
class Sampler::Worker {
 public:
  explicit Worker(int64_t vocabulary)
      : n_(vocabulary),
        logits_(static_cast<size_t>(vocabulary)),
        weights_(static_cast<size_t>(vocabulary)),
        occurrences_(static_cast<size_t>(vocabulary)),
        maxima_(static_cast<size_t>((vocabulary + kMaximaBlock - 1) / kMaximaBlock)),
        sums_(sum_blocks(vocabulary)) {}

  // The most that a row can make it hold: some buffers are made at first use.
  int64_t bytes() const {
    const int64_t rows = 4 + 3;  // logits, weights, occurrences, keys; what the search copies
    const auto blocks = static_cast<int64_t>(4 * maxima_.size() + sums_.size());
    return 4 * (rows * n_ + 3 * (n_ / kCopiedShare) + blocks);
  }

  void sample(const SampleRow& row, SampledToken& out, const BestTokens& best) {
    const SamplerSettings& settings = *row.settings;
    out = {};
    if (!sampler_rows().block_maxima(row.logits, n_, maxima_.data())) {
      out.status = RowStatus::kNotFinite;
      return;
    }
    if (settings.logprobs >= 0) raw_maxima_ = maxima_;
    const float* logits = adjusted(row);
    if (logits != row.logits && !sampler_rows().block_maxima(logits, n_, maxima_.data())) {
      out.status = RowStatus::kNotFinite;
      return;
    }
    const float largest = *std::max_element(maxima_.begin(), maxima_.end());
    if (largest == -kInfinity) {
      out.status = RowStatus::kNothingAllowed;
      return;
    }
    out.id = settings.temperature == 0.0f ? first_with(logits, largest) : draw(logits, largest, row);
    if (settings.logprobs >= 0) {
      maxima_.swap(raw_maxima_);
      read_logprobs(row.logits, out, best);
    }
  }

  void score(const float* logits, int32_t target, SampledToken& out, const BestTokens& best) {
    out = {};
    out.id = target;
    if (!sampler_rows().block_maxima(logits, n_, maxima_.data())) {
      out.status = RowStatus::kNotFinite;
      return;
    }
    read_logprobs(logits, out, best);
  }

 private:
  // The row after masks, bad words, logit_bias, min_tokens and penalties; the row itself if none does anything.
  const float* adjusted(const SampleRow& row) {
    const SamplerSettings& settings = *row.settings;
    const auto output_tokens = static_cast<int64_t>(row.tokens.size()) - row.prompt_tokens;
    const bool masks_ends = output_tokens < settings.min_tokens && !settings.end_ids.empty();
    const bool masks = !row.mask.empty() || !settings.allowed.empty() || !settings.bad_words.empty();
    if (settings.bias_ids.empty() && !masks_ends && !masks && !settings.penalizes()) return row.logits;
    std::copy_n(row.logits, n_, logits_.begin());
    if (!settings.allowed.empty()) keep(settings.allowed.data(), settings.allowed.size());
    if (!row.mask.empty()) keep(row.mask.data(), row.mask.size());
    for (const auto& word : settings.bad_words) {
      if (would_complete(word, row.tokens.subspan(static_cast<size_t>(row.prompt_tokens)))) at(word.back()) = -kInfinity;
    }
    for (size_t i = 0; i < settings.bias_ids.size(); ++i) at(settings.bias_ids[i]) += settings.biases[i];
    if (masks_ends) {
      for (const int32_t id : settings.end_ids) at(id) = -kInfinity;
    }
    if (settings.penalizes()) penalize(row);
    return logits_.data();
  }

  // Tokens without a bit become -infinity. Most words of a grammar's mask are all zeros or all ones.
  template <class Word>
  void keep(const Word* words, size_t count) {
    for (int64_t start = 0; start < n_; start += 32) {
      const auto word = static_cast<size_t>(start / 32);
      const uint32_t bits = word < count ? static_cast<uint32_t>(words[word]) : 0U;
      if (bits == ~0U) continue;
      const int64_t end = std::min<int64_t>(start + 32, n_);
      for (int64_t id = start; id < end; ++id) {
        if (((bits >> (id - start)) & 1U) == 0) logits_[static_cast<size_t>(id)] = -kInfinity;
      }
    }
  }

  // True if the output ends with all of `word` but its last token.
  static bool would_complete(const std::vector<int32_t>& word, std::span<const int32_t> output) {
    const size_t before = word.size() - 1;
    return before <= output.size() && std::equal(word.begin(), word.end() - 1, output.end() - static_cast<ptrdiff_t>(before));
  }

  void penalize(const SampleRow& row) {
    constexpr uint32_t kSeen = 1U << 31;
    const SamplerSettings& settings = *row.settings;
    const auto prompt_tokens = static_cast<size_t>(row.prompt_tokens);
    for (size_t i = 0; i < row.tokens.size(); ++i) {
      uint32_t& count = occurrences_[static_cast<size_t>(row.tokens[i])];
      count = (count | kSeen) + (i >= prompt_tokens ? 1U : 0U);
    }
    for (const int32_t id : row.tokens) {
      uint32_t& seen = occurrences_[static_cast<size_t>(id)];
      if (seen == 0) continue;  // met before, done
      float& logit = at(id);
      logit = logit > 0.0f ? logit / settings.repetition_penalty : logit * settings.repetition_penalty;
      const uint32_t count = seen & ~kSeen;
      if (count > 0) {
        logit = logit - settings.frequency_penalty * static_cast<float>(count);
        logit = logit - settings.presence_penalty;
      }
      seen = 0;
    }
  }

  float& at(int32_t id) { return logits_[static_cast<size_t>(id)]; }

  int32_t first_with(const float* logits, float value) const {
    const auto block = std::find(maxima_.begin(), maxima_.end(), value) - maxima_.begin();
    int64_t id = block * kMaximaBlock;
    while (logits[id] != value) ++id;
    return static_cast<int32_t>(id);
  }

  int32_t draw(const float* logits, float largest, const SampleRow& row) {
    const SamplerSettings& settings = *row.settings;
    const auto scale = static_cast<float>(kLog2E / settings.temperature);
    sums_.resize(sum_blocks(n_));
    sampler_rows().weights(logits, n_, largest, scale, settings.min_p, weights_.data(), sums_.data());
    kept_ = {logits, weights_.data(), nullptr, n_};
    const bool by_mass = settings.top_p < 1.0, by_typicality = settings.typical_p < 1.0;
    // Logits further down have no weight, so that no filter needs to tell them apart.
    const double least = settings.min_p > 0.0f ? natural_log(settings.min_p) - 1e-3 : -128.0 * kLn2;
    const float bottom = std::max(static_cast<float>(largest + least * settings.temperature), kLowest);
    if (settings.top_k > 0 && settings.top_k < n_) {
      const float floor = std::max(top_k_floor(settings.top_k), bottom);
      keep(search_.find(logits, nullptr, n_, settings.top_k, 0.0, floor), settings.top_k < n_ / kCopiedShare && (by_mass || by_typicality));
    }
    if (by_mass) {
      const double mass = kept_mass();
      const float floor = std::max(top_p_floor(largest, mass, settings), bottom);
      keep(search_.find(kept_.logits, kept_.weights, kept_.n, settings.top_p * mass, mass, floor), by_typicality);
    }
    if (by_typicality) keep_typical(largest, settings);
    return draw_weighted(draw_uniform(settings.seed, settings.sample_index, static_cast<uint32_t>(row.tokens.size()),
                                      DrawPurpose::kToken));
  }

  // As many blocks as tokens wanted reach this maximum, so at least that many tokens do.
  float top_k_floor(int64_t count) {
    if (count > static_cast<int64_t>(maxima_.size())) return kLowest;
    order_.assign(maxima_.begin(), maxima_.end());
    std::nth_element(order_.begin(), order_.begin() + (count - 1), order_.end(), std::greater<>());
    return std::max(order_[static_cast<size_t>(count - 1)], kLowest);
  }

  // Tokens of weight below c hold less than n c of mass; with n c half of what top_p drops, none of them is kept.
  float top_p_floor(float largest, double mass, const SamplerSettings& settings) const {
    const double dropped = (1.0 - settings.top_p) * mass;
    const double weight = 0.5 * dropped / static_cast<double>(n_);
    const double logit = largest + natural_log(weight) * settings.temperature;
    return std::max(static_cast<float>(std::max<double>(logit, kLowest)), kLowest);
  }

  // Leaves the prefix of the best: the weights of all others become zero, or, if there is more to come and it is worth
  // the while, what is left is copied together.
  void keep(PrefixEnd end, bool more_to_come) {
    const int64_t most = n_ / kCopiedShare;
    if (more_to_come && kept_.ids == nullptr) {
      const auto room = static_cast<size_t>(most + 16);
      kept_logits_.resize(room);
      kept_weights_.resize(room);
      kept_ids_.resize(room);
      const int64_t left = copy_prefix(kept_.logits, kept_.weights, kept_.n, end, most, kept_logits_.data(), kept_weights_.data(), kept_ids_.data());
      if (left >= 0) {
        kept_ = {kept_logits_.data(), kept_weights_.data(), kept_ids_.data(), left};
        sums_.resize(sum_blocks(left));
      }
    }
    drop_after(kept_.logits, end);
  }

  void drop_after(const float* keys, PrefixEnd end) {
    // In a copy the end has another place, but all that are left of its key are in the prefix.
    sampler_rows().drop_after(keys, kept_.n, end.key, end.id, kept_.weights, sums_.data());
  }

  // Keys by the distance of a token's information, -ln p, from the entropy of what the other filters left.
  void keep_typical(float largest, const SamplerSettings& settings) {
    const double total = kept_mass();
    // -ln p = (largest - logit) / T + ln total, and the entropy is its mean, so ln total drops out of the difference.
    const double mean = sampler_rows().mean_distance(kept_.logits, kept_.weights, kept_.n, largest) / total / settings.temperature;
    keys_.resize(static_cast<size_t>(n_));
    sampler_rows().centered_keys(kept_.logits, kept_.weights, kept_.n, largest, 1.0f / settings.temperature,
                                 static_cast<float>(-mean), keys_.data());
    drop_after(keys_.data(), search_.find(keys_.data(), kept_.weights, kept_.n, settings.typical_p * total, total, kLowest));
  }

  static size_t sum_blocks(int64_t n) { return static_cast<size_t>((n + kSumBlock - 1) / kSumBlock); }

  double kept_mass() const {
    double total = 0.0;
    for (const float sum : sums_) total += sum;
    return total;
  }

  // Inverse of the cumulative distribution in id order: first the block of sums, then the token in it.
  int32_t draw_weighted(double u) const {
    double left = u * kept_mass();
    size_t block = 0;
    while (block + 1 < sums_.size() && left >= sums_[block]) left -= sums_[block++];
    int64_t drawn = -1;
    // Rounding can carry the walk past the last token that has mass; that token is then drawn.
    for (; drawn < 0; block = block == 0 ? sums_.size() - 1 : block - 1, left = kInfinity) {
      const int64_t start = static_cast<int64_t>(block) * kSumBlock;
      for (int64_t id = start; id < std::min(start + kSumBlock, kept_.n); ++id) {
        const double weight = kept_.weights[id];
        if (weight == 0.0) continue;
        drawn = id;
        if (left < weight) break;
        left -= weight;
      }
    }
    return kept_.ids == nullptr ? static_cast<int32_t>(drawn) : kept_.ids[drawn];
  }

  // `maxima_` must be those of `logits`.
  void read_logprobs(const float* logits, SampledToken& out, const BestTokens& best) {
    const float largest = *std::max_element(maxima_.begin(), maxima_.end());
    if (largest == -kInfinity) {
      out.status = RowStatus::kNothingAllowed;
      return;
    }
    sums_.resize(sum_blocks(n_));
    sampler_rows().weights(logits, n_, largest, static_cast<float>(kLog2E), 0.0f, nullptr, sums_.data());
    const double log_total = natural_log(kept_mass());
    const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - largest - log_total); };
    const float own = logits[out.id];
    out.logprob = logprob(own);
    out.rank = 1;
    for (size_t block = 0; block < maxima_.size(); ++block) {
      if (maxima_[block] <= own) continue;
      const int64_t start = static_cast<int64_t>(block) * kMaximaBlock;
      for (int64_t id = start; id < std::min(start + kMaximaBlock, n_); ++id) out.rank += logits[id] > own;
    }
    std::fill_n(best.ids, best.n, -1);
    std::fill_n(best.logprobs, best.n, -kInfinity);
    const auto count = std::min<int64_t>(best.n, n_);
    if (count == 0) return;
    const PrefixEnd end = search_.find(logits, nullptr, n_, static_cast<double>(count), 0.0, top_k_floor(count));
    best_logits_.resize(static_cast<size_t>(count) + 16);
    best_ids_.resize(static_cast<size_t>(count) + 16);
    const int64_t found = copy_prefix(logits, nullptr, n_, end, count, best_logits_.data(), nullptr, best_ids_.data());
    std::stable_sort(best_ids_.begin(), best_ids_.begin() + found, [logits](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    for (int64_t i = 0; i < found; ++i) {
      best.ids[i] = best_ids_[static_cast<size_t>(i)];
      best.logprobs[i] = logprob(logits[best.ids[i]]);
    }
  }

  // What the filters have left of a row: the row itself with weights of zero, or a copy, in order of id.
  struct Kept {
    const float* logits;
    float* weights;
    const int32_t* ids;  // null: the row
    int64_t n;
  };

  int64_t n_;
  std::vector<float> logits_, weights_;
  std::vector<uint32_t> occurrences_;  // all zero between rows
  std::vector<float> maxima_, raw_maxima_, sums_, order_;
  std::vector<float> keys_;  // of typical sampling, made at first use
  std::vector<float> kept_logits_, kept_weights_, best_logits_;
  std::vector<int32_t> kept_ids_, best_ids_;
  Kept kept_{};
  PrefixSearch search_;
};

Sampler::Sampler(int64_t vocabulary, std::shared_ptr<ThreadPool> pool) : vocabulary_(vocabulary), pool_(std::move(pool)) {
  if (vocabulary <= 0) throw std::invalid_argument("the vocabulary must hold at least one token");
  for (int i = 0; i < pool_->size(); ++i) workers_.push_back(std::make_unique<Worker>(vocabulary));
}

Sampler::~Sampler() = default;

int64_t Sampler::scratch_bytes() const {
  return std::accumulate(workers_.begin(), workers_.end(), int64_t{0},
                         [](int64_t bytes, const auto& worker) { return bytes + worker->bytes(); });
}

template <class PerRow>
void Sampler::for_rows(int64_t rows, const PerRow& per_row) {
  if (rows <= 1) {
    const FloatEnvironment environment;
    for (int64_t row = 0; row < rows; ++row) per_row(*workers_[0], static_cast<size_t>(row));
    return;
  }
  pool_->run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share(rows, index, count);
    for (int64_t row = begin; row < end; ++row) per_row(*workers_[static_cast<size_t>(index)], static_cast<size_t>(row));
  });
}

void Sampler::sample(std::span<const SampleRow> rows, std::span<SampledToken> out, std::span<const BestTokens> best) {
  for_rows(static_cast<int64_t>(rows.size()), [&](Worker& worker, size_t row) { worker.sample(rows[row], out[row], best[row]); });
}

void Sampler::score(std::span<const float* const> rows, std::span<const int32_t> targets, std::span<SampledToken> out,
                    std::span<const BestTokens> best) {
  for_rows(static_cast<int64_t>(rows.size()),
           [&](Worker& worker, size_t row) { worker.score(rows[row], targets[row], out[row], best[row]); });
}

}  // namespace tokenmill
