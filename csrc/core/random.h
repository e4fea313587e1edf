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

// The key for elements around a 64-bit `index`: `random_bits` sees only the low half of the index, and elements that
// are 2^32 apart must not share bits.
OPTKIT_HD RandomKey key_at(RandomKey key, int64_t index) {
  return {key.low, key.high ^ static_cast<uint32_t>(index >> 32)};
}

// 32 random bits for element `index`: every value that a step stores for this element is rounded with them.
template <class U>
OPTKIT_HD U random_bits(RandomKey key, U index) {
  U x = index + key.low;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= (x >> 15) ^ key.high;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// The same bits, rotated for state `state`. Rounding uses the leading bits; the parameter and three states get
// different leading 8 bits, so that their rounding errors are not correlated.
template <class U>
OPTKIT_HD U bits_of_state(U random, int state) {
  const int left = state < 3 ? 8 * (state + 1) : 4;
  return (random << left) | (random >> (32 - left));
}

}  // namespace optkit
