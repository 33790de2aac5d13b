// Where the best of a row end: the shortest prefix, by key descending and then by id, that reaches a count or a mass.
//
// A sort of 152k keys takes ten milliseconds. Here a sorted sample guesses where the prefix ends, one pass sums what lies
// above eight thresholds around the guess, and only the keys between the two thresholds that enclose the end are looked
// at further. A wrong guess costs another pass and never the answer.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenmill {

// The last of a prefix: it holds the larger keys, and of equal keys those up to this id.
struct PrefixEnd {
  float key;
  int64_t id;
};

// Copies a prefix of keys[0 .. n - 1] in order of id and returns its size; -1 if it is larger than `most` (room for `most`
// + 16 is needed). `weights` may be null.
int64_t copy_prefix(const float* keys, const float* weights, int64_t n, PrefixEnd end, int64_t most, float* out_keys,
                    float* out_weights, int32_t* out_ids);

class PrefixSearch {
 public:
  // The prefix of keys[0 .. n - 1] whose weights (their number, if `weights` is null) reach `target`; all keys from `floor` up
  // if they do not, and at least one that weighs something. Keys below `floor` are not looked at; one key must reach it.
  // `total` is what all keys from `floor` up weigh, roughly; 0 if unknown. Same bits on every instruction-set path.
  PrefixEnd find(const float* keys, const float* weights, int64_t n, double target, double total, float floor);

 private:
  struct View {
    const float* keys;
    const float* weights;
    const int32_t* ids;  // null: the row itself
    int64_t n;
  };
  struct Candidate {
    float key;
    int32_t id;
    float weight;
    bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : id < other.id; }
  };

  // What lies in [low, high) of the row or the copy, if that is at most `most`.
  bool copy_between(View& rest, float low, float high, int64_t most);
  void guess(const View& rest, float low, float high, double wanted, double total, float* thresholds);
  PrefixEnd among_equals(const View& rest, float key, double wanted) const;
  PrefixEnd among_few(const View& rest, double wanted);

  std::vector<float> keys_, weights_;
  std::vector<int32_t> ids_;
  std::vector<Candidate> candidates_;
};

}  // namespace tokenmill
