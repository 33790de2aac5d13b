#include "executor/linear_op.h"

#include <algorithm>

namespace tokenmill {
namespace {

// Threads take chunks of row blocks; a few chunks each, so that one preempted thread does not hold up the others for
// long, and not too small, so that the weights remain long streams. Whole register tiles of every path (one or three row
// blocks), or the last tile of each chunk would compute row blocks that are not there.
constexpr int32_t kChunksPerThread = 4;
constexpr int32_t kBlocksPerTile = 3;
constexpr int32_t kMostBlocksPerChunk = 20 * kBlocksPerTile;
constexpr int32_t kSerialBlocks = 2;

int32_t row_blocks(const LinearPart& part) { return (part.weight.n + kBlockRows - 1) / kBlockRows; }

LinearArguments arguments_of(const StepContext& context, const LinearPart& part) {
  LinearArguments a{};
  a.weight = part.weight;
  a.x = context.row(part.x, 0);
  a.x_stride = part.x.row_bytes;
  a.rows = context.rows(part.out);
  a.bias = part.bias;
  if (part.residual) {
    a.residual = context.floats(*part.residual, 0);
    a.residual_stride = static_cast<int64_t>(part.residual->row_bytes / sizeof(float));
  }
  a.y = context.floats(part.out, 0);
  a.y_stride = static_cast<int64_t>(part.out.row_bytes / sizeof(float));
  return a;
}

}  // namespace

std::vector<Value> LinearGroupOp::results() const {
  std::vector<Value> values;
  for (const LinearPart& part : parts_) values.push_back(part.out);
  return values;
}

void LinearGroupOp::run(const StepContext& context) const {
  if (context.rows(parts_.front().out) == 0) return;
  const LinearKernels& kernels = linear_kernels();
  int32_t blocks = 0;
  for (const LinearPart& part : parts_) blocks += row_blocks(part);
  if (blocks <= kSerialBlocks || context.pool.size() == 1) {
    for (const LinearPart& part : parts_) {
      kernels.linear(arguments_of(context, part), 0, row_blocks(part), context.scratch(0));
    }
    return;
  }
  const int32_t wanted = blocks / (context.pool.size() * kChunksPerThread);
  const int32_t chunk = std::clamp((wanted + kBlocksPerTile - 1) / kBlocksPerTile * kBlocksPerTile, kBlocksPerTile, kMostBlocksPerChunk);
  std::atomic<int32_t> next{0};
  context.pool.run([&](int index, int) {
    int32_t mine = next.fetch_add(1, std::memory_order_relaxed);
    int32_t first = 0;  // chunks of the parts before
    for (const LinearPart& part : parts_) {
      const int32_t count = (row_blocks(part) + chunk - 1) / chunk;
      if (mine >= first + count) {
        first += count;
        continue;
      }
      const LinearArguments arguments = arguments_of(context, part);
      for (; mine < first + count; mine = next.fetch_add(1, std::memory_order_relaxed)) {
        const int32_t begin = (mine - first) * chunk;
        kernels.linear(arguments, begin, std::min(begin + chunk, row_blocks(part)), context.scratch(index));
      }
      first += count;
    }
  });
}

}  // namespace tokenmill
