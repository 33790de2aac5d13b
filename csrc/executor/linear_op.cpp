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
// A quarter of a usual second-level cache: the reader shares it with what it works on now.
constexpr size_t kMostReadAhead = size_t{256} << 10;

int32_t row_blocks(const LinearPart& part) { return (part.weight.n + kBlockRows - 1) / kBlockRows; }

}  // namespace

LinearArguments linear_arguments(const StepContext& context, const LinearPart& part) {
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

std::vector<Value> LinearGroupOp::results() const {
  std::vector<Value> values;
  for (const LinearPart& part : parts_) values.push_back(part.out);
  return values;
}

int32_t LinearGroupOp::row_blocks() const {
  int32_t blocks = 0;
  for (const LinearPart& part : parts_) blocks += tokenmill::row_blocks(part);
  return blocks;
}

int32_t LinearGroupOp::chunk_blocks(int threads) const {
  const int32_t wanted = row_blocks() / (threads * kChunksPerThread);
  return std::clamp((wanted + kBlocksPerTile - 1) / kBlocksPerTile * kBlocksPerTile, kBlocksPerTile, kMostBlocksPerChunk);
}

std::vector<ThreadPool::Stretch> LinearGroupOp::first_reads(int threads) const {
  std::vector<ThreadPool::Stretch> reads;
  const int32_t chunk = chunk_blocks(threads);
  for (const LinearPart& part : parts_) {
    const PackedWeight& weight = part.weight;
    const size_t block_bytes = row_block_bytes(weight.format, weight.k);
    for (int32_t begin = 0; begin < tokenmill::row_blocks(part) && static_cast<int>(reads.size()) < threads; begin += chunk) {
      const int32_t blocks = std::min(chunk, tokenmill::row_blocks(part) - begin);
      reads.push_back({weight.data + static_cast<size_t>(begin) * block_bytes,
                       std::min(static_cast<size_t>(blocks) * block_bytes, kMostReadAhead) / 64 * 64});
    }
  }
  reads.resize(static_cast<size_t>(threads));
  return reads;
}

void LinearGroupOp::run(const StepContext& context) const {
  if (context.rows(parts_.front().out) == 0) return;
  const LinearKernels& kernels = linear_kernels();
  if (row_blocks() <= kSerialBlocks || context.pool.size() == 1) {
    for (const LinearPart& part : parts_) {
      kernels.linear(linear_arguments(context, part), 0, tokenmill::row_blocks(part), context.scratch(0));
    }
    return;
  }
  const int32_t chunk = chunk_blocks(context.pool.size());
  std::atomic<int32_t> taken{0};  // beyond the first chunk of each thread, which is the one that it has read ahead
  context.pool.run([&](int index, int count) {
    const auto take = [&] { return count + taken.fetch_add(1, std::memory_order_relaxed); };
    int32_t mine = index;
    int32_t first = 0;  // chunks of the parts before
    for (const LinearPart& part : parts_) {
      const int32_t chunks = (tokenmill::row_blocks(part) + chunk - 1) / chunk;
      if (mine >= first + chunks) {
        first += chunks;
        continue;
      }
      const LinearArguments arguments = linear_arguments(context, part);
      for (; mine < first + chunks; mine = take()) {
        const int32_t begin = (mine - first) * chunk;
        kernels.linear(arguments, begin, std::min(begin + chunk, tokenmill::row_blocks(part)), context.scratch(index));
      }
      first += chunks;
    }
  });
}

}  // namespace tokenmill
