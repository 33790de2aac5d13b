// Counts checks; prints the failed ones and a last line "N passed, N failed".
#pragma once

#include <cstdio>
#include <string>

struct Checks {
  int passed = 0, failed = 0;

  void expect(bool holds, const std::string& what) {
    if (holds) {
      ++passed;
    } else {
      ++failed;
      std::printf("FAILED: %s\n", what.c_str());
    }
  }
  int finish() const {
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
  }
};
