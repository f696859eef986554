// What of a filtered row can matter, kept while its logits pass by once: the values that reach a bound of the cutoff.
//
// The k-th largest value so far bounds that of top-k, the mass so far that of top-p, the best value so far that of
// min-p, and all of these only rise. So few values are kept at a time, whatever the order of the groups, and in the end
// all that the filters keep are among them: filters.h finds the cutoff in them that it finds in the whole row.
//
// Groups come in any order, so the mass of a row is known up to rounding. Where that decides whether top-p keeps a
// value, the row is open, and has to be drawn from all its logits.

#pragma once

#include "filters.h"
#include "groups.h"
#include "row.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

namespace {

constexpr int64_t kFewKept = 4 * kGroup;  // of which no bound is worth its time

struct Kept {
  float z;
  int32_t id;
};

// A row of which some values are kept, by rising id: what LogitsRow is to logits. The others are all less than any kept
// by the filters, and look like dropped ones.
struct KeptRow {
  int64_t groups() const { return groups_of(vocab_size); }
  const Kept* begin_of(int64_t group) const {
    return std::lower_bound(begin, end, group * kGroup, [](const Kept& kept, int64_t id) { return kept.id < id; });
  }
  float load(int64_t group, float cutoff, float z[kGroup]) const {
    float largest = -kInf;
    std::fill_n(z, kGroup, -kInf);
    for (const Kept* kept = begin_of(group); kept < end && kept->id < (group + 1) * kGroup; ++kept) {
      if (kept->z < cutoff) continue;
      z[kept->id - group * kGroup] = kept->z;
      largest = std::max(largest, kept->z);
    }
    return largest;
  }
  void maxima(int64_t first, int64_t last, float* out) const {
    std::fill(out + first, out + last, -kInf);
    for (const Kept* kept = begin_of(first); kept < end && kept->id < last * kGroup; ++kept) {
      float& largest = out[kept->id / kGroup];
      largest = std::max(largest, kept->z);
    }
  }
  const Kept *begin, *end;
  int64_t vocab_size;
  double mass;  // of all values, up to rounding and relative to the peak's, where top-p needs it; else 0
};

// Keeps the values of one row, whose groups come from any thread and in any order, in memory that rows share: `bytes`
// are left of it. A row that gets no more of it gives up what it has.
class Keeper {
 public:
  Keeper(const Row& row, int64_t vocab_size, std::atomic<int64_t>& bytes)
      : vocab_size_(vocab_size),
        k_(row.filters.top_k < vocab_size ? std::max<int64_t>(1, row.filters.top_k) : vocab_size + 1),
        by_mass_(row.filters.top_p < 1 && k_ > vocab_size),
        log_share_(by_mass_ ? log_dropped(row.filters, 1, vocab_size) - kMassMargin : 0),
        log_min_p_(row.filters.top_p < 1 ? -kInf : row.filters.log_min_p),
        bytes_(bytes) {}
  Keeper(const Keeper&) = delete;
  ~Keeper() { give_up(); }

  // Whether the values that can matter in such a row may be few, or `surely` are but in flat logits: twice k of them
  // should fit into an eighth of an fp32 row, or of that. What min-p and top-p drop has a part in the sum that top-p
  // takes: beside top-k, neither has a bound then.
  static bool can_keep(const Filters& filters, int64_t vocab_size, bool surely) {
    const int64_t most = vocab_size * int64_t(sizeof(float)) / (surely ? 64 : 8) / int64_t(sizeof(Kept));
    const bool few = 2 * std::clamp<int64_t>(filters.top_k, 0, vocab_size) <= most;
    return few || (filters.top_p < 1 ? !surely && filters.top_k >= vocab_size : filters.log_min_p > -kInf);
  }

  bool is_whole() const { return !gave_up_; }

  // False if the row gives up now.
  bool feed(int64_t group, const float z[kGroup], float largest) {
    if (largest == -kInf || (!by_mass_ && largest < bound_.load(std::memory_order_relaxed))) return true;
    const float mass = by_mass_ && largest < kInf ? mass_of(group_mass(z, largest)) : 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (gave_up_) return true;
    const float peak = std::max(peak_, largest);
    if (by_mass_) mass_ = mass_ * std::exp(double(peak_) - peak) + mass * std::exp(double(largest) - peak);
    peak_ = peak;
    if (largest < bound_) return true;
    if (!make_room()) {
      give_up();
      return false;
    }
    const float bound = bound_;
    for (int64_t i = 0; i < kGroup; ++i) {
      if (z[i] >= bound) values_.push_back({z[i], int32_t(group * kGroup + i)});
    }
    return true;
  }

  // What is kept, when all groups have been fed.
  KeptRow row() {
    raise_bound();
    std::sort(values_.begin(), values_.end(), [](const Kept& a, const Kept& b) { return a.id < b.id; });
    return {values_.data(), values_.data() + values_.size(), vocab_size_, mass_};
  }

 private:
  int64_t room() const { return values_.capacity(); }

  // Room for a group, if need be by a higher bound or by more memory: twice as much where half of it stays in use.
  bool make_room() {
    if (int64_t(values_.size()) + kGroup <= room()) return true;
    raise_bound();
    const int64_t size = values_.size();
    if (room() > 0 && size <= room() / 2) return true;
    const int64_t more = std::max(kFewKept, 2 * room()), price = more * int64_t(sizeof(Kept));
    if (bytes_.fetch_sub(price) < price) {  // both are there while values move
      bytes_ += price;
      return size + std::max(kGroup, room() / 8) <= room();
    }
    const int64_t before = room() * int64_t(sizeof(Kept));
    values_.reserve(more);
    bytes_ += before;
    return true;
  }

  // No value is NaN or -inf (load_group). A bound is NaN in a row with +inf, and is then none: std::max.
  void raise_bound() {
    float bound = std::max<float>(bound_, peak_ + log_min_p_);
    if (by_mass_) bound = std::max(bound, std::nextafter(float(peak_ + std::log(mass_) + log_share_), -kInf));
    if (k_ <= int64_t(values_.size())) {
      const auto kth = values_.begin() + (k_ - 1);
      std::nth_element(values_.begin(), kth, values_.end(), [](const Kept& a, const Kept& b) { return a.z > b.z; });
      bound = std::max(bound, kth->z);
    }
    const auto is_less = [&](const Kept& kept) { return kept.z < bound; };
    values_.erase(std::remove_if(values_.begin(), values_.end(), is_less), values_.end());
    bound_ = bound;
  }

  void give_up() {
    bytes_ += room() * int64_t(sizeof(Kept));
    std::vector<Kept>().swap(values_);
    gave_up_ = true;
    bound_ = kInf;
  }

  const int64_t vocab_size_, k_;  // of no top-k: more than there are
  const bool by_mass_;            // top-p alone
  const double log_share_;
  const float log_min_p_;
  std::atomic<int64_t>& bytes_;
  std::mutex mutex_;
  std::vector<Kept> values_;
  std::atomic<float> bound_ = std::numeric_limits<float>::lowest();
  float peak_ = -kInf;
  double mass_ = 0;  // of all values so far, relative to the peak's
  bool gave_up_ = false;
};

}  // namespace
