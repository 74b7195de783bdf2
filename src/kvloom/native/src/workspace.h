// The memory that one thread works in.
#pragma once

#include "attention.h"
#include "integers.h"
#include "product.h"

namespace kvloom {

constexpr int most_rows = strip_rows<std::int16_t>;  // of a strip, whatever is multiplied
static_assert(most_rows >= few_rows && most_rows >= strip_rows<bf16>);

template <class P> struct Workspace {
    Word *keys, *values;              // the packed block
    P *nothing;                       // zeros, for where no token is held
    P *converted_keys, *converted_values;  // rows that are not P in the store
    P* queries;                       // [rows, key_dim in words]
    P* turned;                        // [key_dim], a query on its way there, as the store has it
    P* few_queries;                   // [key_dim in words, rows of a strip]
    float* wide_queries;              // [rows, key_dim], for products with scales
    float* scales;                    // [pieces, key_dim]
    std::int16_t* integers;           // queries as these, [pieces, rows of a strip, key_dim]
    std::int32_t *low, *high;         // [rows], the positions that each sees
    float* tops;                      // [rows], the running maxima, of scores times log2(e)
    float* weight_sums;               // [rows, 16], added up when the partition ends
    float *sums, *totals;             // [rows, record]
    alignas(64) P weights[most_rows][block_positions];
    alignas(64) float wide_weights[most_rows][block_positions];  // times the scales of values
    alignas(64) std::int16_t integer_weights[most_rows][block_positions];
    alignas(64) float scores[most_rows][block_positions];
    alignas(64) float column_scales[block_positions];  // of values that are codes
    std::int64_t bytes;               // if `memory` was null, how much is needed

    Workspace(const Shape& shape, std::int64_t rows, bool sealed, char* memory) {
        const std::int64_t key_dim = rounded_up(shape.key_dim, depth<P>), widest = std::max(shape.key_dim, shape.value_dim);
        const std::int64_t padded = rounded_up(shape.key_dim, integers_at_once);
        take(memory, keys, block_positions * rounded_up(key_dim, 2 * lanes));
        take(memory, values, block_positions * shape.columns());
        take(memory, nothing, widest);
        take(memory, converted_keys, block_positions * shape.key_dim);
        take(memory, converted_values, block_positions * shape.value_dim);
        take(memory, queries, rows * key_dim);
        take(memory, turned, shape.key_dim);
        take(memory, few_queries, few_rows * rounded_up(key_dim, 2 * lanes));
        take(memory, wide_queries, sealed ? rows * padded : 0);
        take(memory, scales, sealed ? pieces_at_once * padded : 0);
        take(memory, integers, sealed ? pieces_at_once * most_rows * std::max(padded, few_stride) : 0);
        take(memory, low, rows);
        take(memory, high, rows);
        take(memory, tops, rows + lanes);
        take(memory, weight_sums, rows * lanes);
        take(memory, sums, rows * shape.record());
        take(memory, totals, rows * shape.record());
        bytes = std::int64_t(memory - static_cast<char*>(nullptr));
    }

private:
    template <class T> static void take(char*& memory, T*& part, std::int64_t count) {
        part = reinterpret_cast<T*>(memory);
        memory += rounded_up(count * std::int64_t(sizeof(T)), 64);
    }
};

}  // namespace kvloom
