// Gumbel-max in two levels over groups that arrive in rising order, each with its z: see reference/sampling.py.

#pragma once

#include "groups.h"
#include "random.h"
#include "row.h"

#include <cstdint>

namespace {

constexpr float kLogGroup = 4.16f;  // a bound on log(64) = 4.1589 that no rounding exceeds

struct Candidate {
  float score() const { return mass + noise; }
  float mass = -kInf, noise = -kInf;  // of the group: logsumexp (maximum if greedy), G1
  float inner = -kInf;                // z + G2 of its best token
  int64_t token = -1;
};

// No score of a group with this maximum is larger: rounding is monotonic, and so is everything that makes a score.
SELFGEN_INLINE float score_bound(const Row& row, float largest, float noise) {
  return (row.greedy ? largest : largest + kLogGroup) + noise;
}

class Draw {
 public:
  // Of the ids first_id, .., end_id - 1. Their groups are the one that the first id cuts, whole ones, and the one that
  // the last id cuts: three places, as only whole groups compete.
  Draw(const Row& row, int64_t first_id, int64_t end_id) : row_(&row), first_id_(first_id), end_id_(end_id) {}

  const Row& row() const { return *row_; }
  bool is_valid() const { return is_valid_; }
  const Candidate& candidate(int64_t place) const { return best_[place]; }

  // G1 of a group.
  float noise(int64_t group) {
    if (row_->greedy) return 0;
    if (group / kGroup != noise_block_) {
      noise_block_ = group / kGroup;
      gumbel64(row_->key, kGroupNoise, uint32_t(noise_block_ * kGroup), noise_);
    }
    return noise_[group % kGroup];
  }

  // Whether a group with this maximum has to be fed.
  bool matters(int64_t group, float largest, float noise) const {
    return largest == kInf || (largest > -kInf && score_bound(*row_, largest, noise) > best_[place(group)].score());
  }

  void feed(int64_t group, const float z[kGroup], float largest, float noise) {
    is_valid_ = is_valid_ && largest < kInf;
    if (!is_valid_ || !matters(group, largest, noise)) return;
    const float mass = row_->greedy ? largest : largest + log_(mass_of(group_mass(z, largest)));
    Candidate& best = best_[place(group)];
    if (mass + noise > best.score()) best = candidate(group, z, mass, noise);
  }

  // Takes in the candidates of other groups of the same ids.
  void merge(const Draw& other) {
    is_valid_ = is_valid_ && other.is_valid_;
    for (int64_t i = 0; i < 3; ++i) {
      const Candidate& theirs = other.best_[i];
      const bool tie = theirs.score() == best_[i].score() && theirs.token >= 0 && theirs.token < best_[i].token;
      if (theirs.score() > best_[i].score() || tie) best_[i] = theirs;
    }
  }

 private:
  int64_t place(int64_t group) const {
    return group * kGroup < first_id_ ? 0 : (group + 1) * kGroup > end_id_ ? 2 : 1;
  }

  Candidate candidate(int64_t group, const float z[kGroup], float mass, float noise) const {
    float token_noise[kGroup] = {};
    if (!row_->greedy) gumbel64(row_->key, kTokenNoise, 0, token_noise);
    Candidate best{mass, noise, -kInf, -1};
    for (int64_t i = 0; i < kGroup; ++i) {
      const float inner = z[i] + token_noise[i];
      if (inner > best.inner) {
        best.inner = inner;
        best.token = group * kGroup + i;
      }
    }
    return best;
  }

  const Row* row_;
  int64_t first_id_, end_id_;
  Candidate best_[3];
  bool is_valid_ = true;
  int64_t noise_block_ = -1;
  float noise_[kGroup];
};

}  // namespace
