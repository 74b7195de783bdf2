// Weights of linear layers, packed so that the CPU reads them in the order in which they lie.
//
// Packed weights are tiles of 16 outputs. A tile is a sequence of lines; a line holds the weights of 16 outputs for one k
// ([N/16][K][16]: float32, float16) or for two neighbouring ones ([N/16][K/2][16][2]: bfloat16, as the CPU's
// dot products of pairs want them). Outputs beyond N and a k beyond K are zeros.
#pragma once

#include "simd.h"

namespace kvloom {

// As in Python.
enum Dtype : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How many k a line holds.
template <class Element> constexpr int depth_of = 1;
template <> constexpr int depth_of<bf16> = 2;

template <class Element> constexpr std::int64_t tile_elements(std::int64_t inner) {
    return ceil_div(inner, depth_of<Element>) * depth_of<Element> * lanes;
}

// rows[i] = the plain weights of output ids[i], [count, inner]: for embeddings that are tied to a packed weight. To be
// called by every thread of a parallel region; the rows are there for all threads when it returns.
void look_up(int dtype, const void* packed, std::int64_t inner, const std::int64_t* ids, std::int64_t count, void* rows);

}  // namespace kvloom
