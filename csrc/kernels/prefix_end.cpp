#include "kernels/prefix_end.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/sampler_rows.h"

namespace tokenmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSamples = 512;
constexpr int64_t kFew = 128;    // sorted at the end
constexpr int64_t kPart = 4096;  // copied at once, before the row is narrowed down
constexpr int64_t kSpill = 16;   // `gather` notices after a vector that there are too many

float next_above(float x) { return std::nextafter(x, kInfinity); }

}  // namespace

int64_t copy_prefix(const float* keys, const float* weights, int64_t n, PrefixEnd end, int64_t most, float* out_keys,
                    float* out_weights, int32_t* out_ids) {
  const int64_t split = std::min(end.id + 1, n);  // keys equal to the end's count up to here
  const int64_t first = sampler_rows().gather(keys, weights, nullptr, split, end.key, kInfinity, most, out_keys, out_weights, out_ids);
  if (first < 0) return -1;
  const int64_t second =
      sampler_rows().gather(keys + split, weights == nullptr ? nullptr : weights + split, nullptr, n - split, next_above(end.key),
                            kInfinity, most - first, out_keys + first, weights == nullptr ? nullptr : out_weights + first, out_ids + first);
  if (second < 0) return -1;
  for (int64_t i = first; i < first + second; ++i) out_ids[i] += static_cast<int32_t>(split);
  return first + second;
}

PrefixEnd PrefixSearch::find(const float* keys, const float* weights, int64_t n, double target, double total, float floor) {
  // A target of 0 is reached before the first key: the search would end above all of them, with nothing kept.
  target = std::max(target, std::numeric_limits<double>::min());
  View rest{keys, weights, nullptr, n};
  float low = floor, high = kInfinity;       // the end lies in [low, high), which `rest` holds, perhaps with more around it
  double from_low = total, from_high = 0.0;  // what of `rest` lies from `low` and from `high` up
  bool copied = copy_between(rest, low, high, std::min(kPart, n));
  while (!copied || rest.n > kFew) {
    float thresholds[kThresholds];
    double reached[kThresholds];
    guess(rest, low, high, target - from_high, from_low - from_high, thresholds);
    sampler_rows().above(rest.keys, rest.weights, rest.n, thresholds, reached);
    for (int t = 0; t < kThresholds; ++t) {  // ascending: the last that is reached, and the first that is not
      if (reached[t] >= target) {
        low = thresholds[t];
        from_low = reached[t];
      } else {
        high = thresholds[t];
        from_high = reached[t];
        break;
      }
    }
    if (high == next_above(low)) return among_equals(rest, low, target - from_high);
    if (copy_between(rest, low, high, copied ? rest.n : n / 6)) {
      copied = true;
      target -= from_high;
      from_low -= from_high;
      from_high = 0.0;
    }
  }
  // Sums that rounding has left short of the target: the prefix is all that was above.
  if (rest.n == 0) return {high, n - 1};
  return among_few(rest, target);
}

bool PrefixSearch::copy_between(View& rest, float low, float high, int64_t most) {
  const auto room = static_cast<size_t>(most + kSpill);
  if (keys_.size() < room) {
    keys_.resize(room);
    weights_.resize(room);
    ids_.resize(room);
  }
  const int64_t count = sampler_rows().gather(rest.keys, rest.weights, rest.ids, rest.n, low, high, most, keys_.data(),
                                              weights_.data(), ids_.data());
  if (count < 0) return false;
  rest = {keys_.data(), rest.weights == nullptr ? nullptr : weights_.data(), ids_.data(), count};
  return true;
}

// Eight ascending thresholds: five around the key where the prefix would end if [low, high) were like a sample of it, and
// three further away, because a few tokens that the sample missed may hold much of the mass.
void PrefixSearch::guess(const View& rest, float low, float high, double wanted, double total, float* thresholds) {
  candidates_.clear();
  const auto sample = [&](const View& from) {
    const int64_t stride = std::max<int64_t>(1, from.n / kSamples);
    for (int64_t i = stride / 2; i < from.n; i += stride) {
      if (from.keys[i] < low || from.keys[i] >= high) continue;
      candidates_.push_back({from.keys[i], static_cast<int32_t>(i), from.weights == nullptr ? 1.0f : from.weights[i]});
    }
    return static_cast<double>(stride);
  };
  double scale = sample(rest);
  // So little of the row lies in the range that the sample has none of it: take some of the copy that was given up.
  if (candidates_.empty()) scale = sample({keys_.data(), nullptr, nullptr, kPart});
  std::sort(candidates_.begin(), candidates_.end());
  const auto last = static_cast<int64_t>(candidates_.size()) - 1;
  double mass = 0.0;
  for (const Candidate& each : candidates_) mass += each.weight;
  if (total > 0.0 && mass > 0.0) scale = total / mass;
  int64_t rank = 0;
  for (double sum = 0.0; rank < last; ++rank) {
    sum += candidates_[static_cast<size_t>(rank)].weight * scale;
    if (sum >= wanted) break;
  }
  int64_t ranks[kThresholds] = {last, rank + 24, rank + 6, rank, rank - 6, rank - 24, rank / 4, 0};
  std::sort(ranks, ranks + kThresholds, std::greater<>());
  for (int t = 0; t < kThresholds; ++t) {
    thresholds[t] = candidates_[static_cast<size_t>(std::clamp<int64_t>(ranks[t], 0, last))].key;
    // Once more the same key: then just above it, which sets it apart.
    if (t > 0 && thresholds[t] <= thresholds[t - 1]) thresholds[t] = next_above(thresholds[t - 1]);
  }
}

// The end among keys equal to `key`, which are in order of id; `wanted` counts from the first of them.
PrefixEnd PrefixSearch::among_equals(const View& rest, float key, double wanted) const {
  const auto id = [&rest](int64_t i) { return rest.ids == nullptr ? i : int64_t{rest.ids[i]}; };
  float thresholds[kThresholds];
  std::fill_n(thresholds, kThresholds, next_above(key));
  thresholds[0] = key;
  int64_t last = 0;
  for (int64_t start = 0; start < rest.n; start += kSumBlock) {
    const int64_t end = std::min(start + kSumBlock, rest.n);
    const float* weights = rest.weights == nullptr ? nullptr : rest.weights + start;
    double reached[kThresholds];
    sampler_rows().above(rest.keys + start, weights, end - start, thresholds, reached);
    const double equal = reached[0] - reached[1];
    if (equal < wanted) {
      wanted -= equal;
      continue;
    }
    for (int64_t i = start; i < end; ++i) {
      if (rest.keys[i] != key) continue;
      last = id(i);
      wanted -= rest.weights == nullptr ? 1.0 : static_cast<double>(rest.weights[i]);
      if (wanted <= 0.0) break;
    }
    return {key, last};
  }
  return {key, id(rest.n - 1)};
}

PrefixEnd PrefixSearch::among_few(const View& rest, double wanted) {
  candidates_.clear();
  for (int64_t i = 0; i < rest.n; ++i) {
    candidates_.push_back({rest.keys[i], rest.ids[i], rest.weights == nullptr ? 1.0f : rest.weights[i]});
  }
  std::sort(candidates_.begin(), candidates_.end());
  size_t last = 0;
  double sum = candidates_[0].weight;
  while (sum < wanted && last + 1 < candidates_.size()) sum += candidates_[++last].weight;
  return {candidates_[last].key, candidates_[last].id};
}

}  // namespace tokenmill
