#include "kernels/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "kernels/philox.h"
#include "kernels/sampler_rows.h"
#include "platform/float_environment.h"

namespace tokenmill {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
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

struct Candidate {
  float key;  // larger is kept first
  float weight;
  int32_t id;
};

bool before(const Candidate& a, const Candidate& b) { return a.key != b.key ? a.key > b.key : a.id < b.id; }

enum class Measure { kCount, kMass };

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
        sums_(static_cast<size_t>((vocabulary + kSumBlock - 1) / kSumBlock)) {}

  int64_t bytes() const {
    const size_t words = logits_.size() + weights_.size() + occurrences_.size() + keys_.size() + sums_.size() +
                         maxima_.size() + key_maxima_.size() + order_.size();
    return static_cast<int64_t>(4 * words + sizeof(Candidate) * candidates_.capacity());
  }

  void sample(const SampleRow& row, SampledToken& out, const BestTokens& best) {
    const SamplerSettings& settings = *row.settings;
    out = {};
    if (!sampler_rows().block_maxima(row.logits, n_, maxima_.data())) {
      out.status = RowStatus::kNotFinite;
      return;
    }
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
      if (logits != row.logits) sampler_rows().block_maxima(row.logits, n_, maxima_.data());
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
    sampler_rows().weights(logits, n_, largest, scale, weights_.data(), sums_.data());
    // Every filter sets the weights of what it drops to zero.
    // Logits further down have no weight, so that no filter needs to tell them apart.
    const float bottom = std::max(static_cast<float>(largest - 128.0 * kLn2 * settings.temperature), kLowest);
    if (settings.min_p > 0.0f) sampler_rows().drop_below(weights_.data(), n_, settings.min_p, weights_.data(), sums_.data());
    if (settings.top_k > 0 && settings.top_k < n_) {
      keep_best(logits, maxima_, Measure::kCount, settings.top_k, std::max(top_k_floor(settings.top_k), bottom), largest);
    }
    if (settings.top_p < 1.0) {
      const float floor = std::max(top_p_floor(largest, settings), bottom);
      keep_best(logits, maxima_, Measure::kMass, settings.top_p * row_mass(), floor, largest);
    }
    if (settings.typical_p < 1.0) keep_typical(logits, largest, settings);
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
  float top_p_floor(float largest, const SamplerSettings& settings) const {
    const double dropped = (1.0 - settings.top_p) * row_mass();
    const double weight = 0.5 * dropped / static_cast<double>(n_);
    const double logit = largest + natural_log(weight) * settings.temperature;
    return std::max(static_cast<float>(std::max<double>(logit, kLowest)), kLowest);
  }

  // Keeps the shortest prefix, by key and then by id, whose count or mass reaches `target` (all keys from `floor` up if
  // none does); at least one token. `maxima` are the keys', `largest` the largest of them. The key where the prefix ends is found by
  // passes that try eight thresholds at once, until few enough keys are left between two of them to be sorted.
  void keep_best(const float* keys, const std::vector<float>& maxima, Measure measure, double target, float floor, float largest) {
    constexpr int64_t kFew = 512;
    float low = floor, high = kInfinity;  // the prefix down to `low` reaches the target, down to `high` does not
    double base = 0.0;                    // measure of the keys from `high` up
    while (!gather(keys, maxima, low, high, kFew)) {
      float thresholds[kThresholds];
      const double top = high == kInfinity ? std::nextafter(largest, kInfinity) : high;
      for (int t = 0; t < kThresholds; ++t) {
        thresholds[t] = static_cast<float>(low + (top - static_cast<double>(low)) * ((t + 1) / (kThresholds + 1.0)));
      }
      if (high == kInfinity) thresholds[kThresholds - 1] = largest;  // finds many equal best tokens at once
      if (std::nextafter(low, kInfinity) >= static_cast<float>(top)) {  // all tie at `low`: they are in order of id
        gather(keys, maxima, low, high, n_);
        break;
      }
      Above above;
      sampler_rows().above(keys, weights_.data(), n_, thresholds, &above);
      const float old_low = low, old_high = high;
      for (int t = 0; t < kThresholds; ++t) {
        const double reached = measure == Measure::kCount ? static_cast<double>(above.count[t]) : above.mass[t];
        if (reached >= target) {
          low = std::max(low, thresholds[t]);
        } else {
          base = reached;
          high = thresholds[t];
          break;
        }
      }
      if (low == old_low && high == old_high) low = std::nextafter(low, kInfinity);  // unreachable but for rounding
    }
    if (!std::is_sorted(candidates_.begin(), candidates_.end(), before)) {
      std::sort(candidates_.begin(), candidates_.end(), before);
    }
    const auto value = [measure](const Candidate& c) { return measure == Measure::kCount ? 1.0 : static_cast<double>(c.weight); };
    size_t last = 0;
    while (last + 1 < candidates_.size() && base + value(candidates_[last]) < target) base += value(candidates_[last++]);
    for (size_t i = last + 1; i < candidates_.size() && candidates_[i].key == candidates_[last].key; ++i) {
      weights_[static_cast<size_t>(candidates_[i].id)] = 0.0f;
    }
    sampler_rows().drop_below(keys, n_, candidates_[last].key, weights_.data(), sums_.data());
  }

  // Fills `candidates_` with keys in [low, high), in id order. False, and incomplete, if there are more than `most`.
  bool gather(const float* keys, const std::vector<float>& maxima, float low, float high, int64_t most) {
    candidates_.clear();
    for (size_t block = 0; block < maxima.size(); ++block) {
      if (maxima[block] < low) continue;
      const int64_t start = static_cast<int64_t>(block) * kMaximaBlock, end = std::min(start + kMaximaBlock, n_);
      int inside = 0;  // counted first, without branches: most blocks have none
      for (int64_t id = start; id < end; ++id) inside += static_cast<int>(keys[id] >= low) & static_cast<int>(keys[id] < high);
      for (int64_t id = start; inside > 0 && id < end; ++id) {
        if (keys[id] < low || keys[id] >= high) continue;
        candidates_.push_back({keys[id], weights_[static_cast<size_t>(id)], static_cast<int32_t>(id)});
      }
      if (static_cast<int64_t>(candidates_.size()) > most) return false;
    }
    return true;
  }

  // Keys by the distance of a token's information, -ln p, from the entropy of what the other filters left.
  void keep_typical(const float* logits, float largest, const SamplerSettings& settings) {
    const double total = row_mass();
    // -ln p = (largest - logit) / T + ln total, and the entropy is its mean, so ln total drops out of the difference.
    const double mean = sampler_rows().mean_distance(logits, weights_.data(), n_, largest) / total / settings.temperature;
    keys_.resize(static_cast<size_t>(n_));
    key_maxima_.resize(maxima_.size());
    sampler_rows().centered_keys(logits, weights_.data(), n_, largest, 1.0f / settings.temperature,
                                 static_cast<float>(-mean), keys_.data());
    sampler_rows().block_maxima(keys_.data(), n_, key_maxima_.data());
    const auto [floor, top] = ends(keys_);
    keep_best(keys_.data(), key_maxima_, Measure::kMass, settings.typical_p * total, floor, top);
  }

  // Smallest finite and largest element; there is a finite one.
  static std::pair<float, float> ends(const std::vector<float>& keys) {
    float low = kInfinity, high = -kInfinity;
    for (const float key : keys) {
      low = key != -kInfinity && key < low ? key : low;
      high = key > high ? key : high;
    }
    return {low, high};
  }

  double row_mass() const {
    double total = 0.0;
    for (const float sum : sums_) total += sum;
    return total;
  }

  // Inverse of the cumulative distribution in id order: first the block of sums, then the token in it.
  int32_t draw_weighted(double u) const {
    double left = u * row_mass();
    size_t block = 0;
    while (block + 1 < sums_.size() && left >= sums_[block]) left -= sums_[block++];
    int64_t drawn = -1;
    // Rounding can carry the walk past the last token that has mass; that token is then drawn.
    for (; drawn < 0; block = block == 0 ? sums_.size() - 1 : block - 1, left = kInfinity) {
      const int64_t start = static_cast<int64_t>(block) * kSumBlock;
      for (int64_t id = start; id < std::min(start + kSumBlock, n_); ++id) {
        const double weight = weights_[static_cast<size_t>(id)];
        if (weight == 0.0) continue;
        drawn = id;
        if (left < weight) break;
        left -= weight;
      }
    }
    return static_cast<int32_t>(drawn);
  }

  // `maxima_` must be those of `logits`.
  void read_logprobs(const float* logits, SampledToken& out, const BestTokens& best) {
    const float largest = *std::max_element(maxima_.begin(), maxima_.end());
    if (largest == -kInfinity) {
      out.status = RowStatus::kNothingAllowed;
      return;
    }
    sampler_rows().weights(logits, n_, largest, static_cast<float>(kLog2E), nullptr, sums_.data());
    const double log_total = natural_log(row_mass());
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
    const float threshold = top_k_floor(count);
    candidates_.clear();
    for (size_t block = 0; block < maxima_.size(); ++block) {
      if (maxima_[block] < threshold) continue;
      const int64_t start = static_cast<int64_t>(block) * kMaximaBlock;
      for (int64_t id = start; id < std::min(start + kMaximaBlock, n_); ++id) {
        if (logits[id] >= threshold) candidates_.push_back({logits[id], 0.0f, static_cast<int32_t>(id)});
      }
    }
    const auto wanted = std::min(count, static_cast<int64_t>(candidates_.size()));
    std::partial_sort(candidates_.begin(), candidates_.begin() + wanted, candidates_.end(), before);
    for (int64_t i = 0; i < wanted; ++i) {
      best.ids[i] = candidates_[static_cast<size_t>(i)].id;
      best.logprobs[i] = logprob(candidates_[static_cast<size_t>(i)].key);
    }
  }

  int64_t n_;
  std::vector<float> logits_, weights_;
  std::vector<uint32_t> occurrences_;  // all zero between rows
  std::vector<float> maxima_, sums_, order_;
  std::vector<float> keys_, key_maxima_;  // of typical sampling, made at first use
  std::vector<Candidate> candidates_;
};

Sampler::Sampler(int64_t vocabulary, int threads) : vocabulary_(vocabulary), pool_(threads) {
  if (vocabulary <= 0) throw std::invalid_argument("the vocabulary must hold at least one token");
  for (int i = 0; i < pool_.size(); ++i) workers_.push_back(std::make_unique<Worker>(vocabulary));
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
  pool_.run([&](int index, int count) {
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
