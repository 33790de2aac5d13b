#include "platform/mapping.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace tokenmill {

Mapping::Mapping(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(memory);
#ifdef MADV_HUGEPAGE
  // Advice only: without huge pages everything works, with more TLB misses.
  if (bytes >= (size_t{2} << 20)) (void)madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace tokenmill
