// Products of rows with packed weights: outputs[row, n] = sum over k of inputs[row, k] * weights[n, k] + bias[n].
#pragma once

#include "packing.h"

namespace kvloom {

// One packed weight, and where its products go.
struct Projection {
    const void* weights;         // packed, see packing.h
    const void* bias;            // [outputs], or null
    const void* residual;        // [rows, outputs]: added to the rounded product, and rounded again; or null
    void* output;                // [rows, outputs]; may be the residual itself
    std::int64_t outputs;
    std::int64_t residual_stride;  // elements from row to row
    std::int64_t output_stride;
};

// Several projections of the same rows. Layouts are those of ctypes structures in linear.py.
struct LinearCall {
    const void* inputs;  // [rows, inner]
    std::int64_t rows;
    std::int64_t inner;
    std::int64_t input_stride;  // elements from row to row
    const Projection* projections;
    std::int32_t projection_count;
    std::int32_t dtype;  // Dtype, of inputs, weights and outputs alike
};

// To be called by every thread of a parallel region (or outside of one), which then share the work. Outputs are
// complete for all threads when it returns.
void linear(const LinearCall& call);

}  // namespace kvloom
