// How one row is drawn: its random numbers, temperature and filters. Nothing that handles one row needs ATen.

#pragma once

#include "groups.h"
#include "random.h"

#include <cstdint>
#include <limits>

namespace {

// At their defaults, they keep all.
struct Filters {
  // Whether a token could be dropped. A min_p that is NaN, which no one could accept, drops nothing at all.
  bool drop_any(int64_t vocab_size) const {
    return log_min_p == log_min_p && (top_k < vocab_size || top_p < 1 || log_min_p > -kInf);
  }
  int64_t top_k = std::numeric_limits<int64_t>::max();
  double top_p = 1;
  float log_min_p = -kInf;
};

struct Row {
  int64_t index;  // in the tensors of the call
  RowKey key;
  bool greedy;
  float scale;  // 1 / temperature, or 1 if greedy
  Filters filters;
};

}  // namespace
