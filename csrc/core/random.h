// SPDX-License-Identifier: Apache-2.0
// Counter-based random bits: a pure function of (key, index), so the same on CPU and CUDA and for any number of
// threads. Source: the 32-bit finalizer "lowbias32" (C. Wellons, hash-prospector, public domain), with two keys; keys
// come from splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", Figure 16).
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace optkit {

struct RandomKey {
  uint32_t low, high;
};

OPTKIT_HD uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

OPTKIT_HD RandomKey random_key(uint64_t seed, uint64_t step, uint64_t tensor) {
  const uint64_t key = splitmix64(splitmix64(splitmix64(seed) + step) + tensor);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

template <class U>  // uint32_t, or a vector of them
OPTKIT_HD U lowbias32(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// The key for words around a 64-bit `word`: `random_word` sees only the low half of the number, and words that are 2^32
// apart must not be equal.
OPTKIT_HD RandomKey key_at(RandomKey key, int64_t word) {
  return {key.low, key.high ^ static_cast<uint32_t>(word >> 32)};
}

// Word number `word` of the stream.
template <class U>
OPTKIT_HD U random_word(RandomKey key, U word) {
  U x = word + key.low;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= (x >> 15) ^ key.high;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

template <class U>
OPTKIT_HD U rotated(U word, int left) {
  return (word << left) | (word >> (32 - left));
}

// 32 random bits for element `index`: every value that a step stores for this element is rounded with them. Two
// neighbors share a word, which is most of the cost; the second has its halves exchanged, so that the 16 bits that
// round a number to bf16 are not those of its neighbor.
OPTKIT_HD uint32_t random_bits(RandomKey key, int64_t index) {
  const uint32_t word = random_word(key_at(key, index >> 1), static_cast<uint32_t>(index >> 1));
  return index & 1 ? rotated(word, 16) : word;
}

// The same bits, rotated for state `state`. Rounding uses the leading bits; the parameter and three states get
// different leading 8 bits, so that their rounding errors are not correlated.
constexpr int kAverageState = 4;  // the average of the parameters, after the states of a rule
template <class U>
OPTKIT_HD U bits_of_state(U random, int state) {
  return rotated(random, state < 3 ? 8 * (state + 1) : state == 3 ? 4 : 12);
}

}  // namespace optkit
