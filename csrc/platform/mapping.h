// Anonymous memory from the kernel: zeroed, page aligned, committed when first touched, huge pages advised.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenmill {

class Mapping {
 public:
  Mapping() = default;
  // Throws std::bad_alloc if the address space or the commit limit does not allow it.
  explicit Mapping(size_t bytes);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace tokenmill
