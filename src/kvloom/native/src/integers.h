// Codes that are multiplied as they are.
//
// A code is an 8-bit integer, and its scale goes to the other factor: those of keys to the query, those of values to the
// weights. What results is rounded to 16-bit integers of which the largest is about 32767, so that a sum of products is exact,
// in whatever order, and one float says what it is worth.
#pragma once

#include <algorithm>
#include <cmath>

#include "kept.h"
#include "pack.h"
#include "simd.h"

namespace kvloom {

// Numbers are filled up with zeros to a multiple of it.
constexpr int integers_at_once = 2 * lanes;
constexpr int pieces_at_once = 4;

// Columns of one block of 16 positions whose keys have the same scales.
struct Piece {
    int vector, first, end;  // of 16 columns
    const bf16* scales;
};

struct Pieces {
    int count = 0;
    Piece pieces[block_positions];

    void find(const Scales& scales, const std::int32_t* slots) {
        count = 0;
        for (int i = 0; i < block_positions; ++i) {
            if (slots[i] < 0) continue;
            const bf16* own = scales.of_block(slots[i]);
            Piece* last = count ? pieces + count - 1 : nullptr;
            if (last && last->vector == i / lanes && last->scales == own) last->end = i % lanes + 1;
            else pieces[count++] = {i / lanes, i % lanes, i % lanes + 1, own};
        }
    }

    // Whether no other piece has columns of the same vector.
    bool is_alone(int index) const {
        const int vector = pieces[index].vector;
        return (!index || pieces[index - 1].vector < vector) && (index + 1 == count || pieces[index + 1].vector > vector);
    }
};

// Rows of `columns` numbers, number(row, column) and those behind it, become integers [rows, columns]. worth[row] says what one
// is worth, and is NaN if a number is not finite. `terms`: of how many products with codes a sum must stay below 2 ** 31.
template <class Number>
void round_rows(int rows, std::int64_t columns, std::int64_t terms, std::int16_t* integers, float* worth, Number number) {
    const f32x16 most = all(std::min(32767.0f, std::floor(2147483520.0f / (127.0f * float(terms)))));
    for (int row = 0; row < rows; row += lanes) {
        const int count = std::min(lanes, rows - row);
        i32x16 sizes[lanes];
        for (int i = 0; i < lanes; ++i) {
            sizes[i] = no_sums();
            for (std::int64_t c = 0; i < count && c < columns; c += lanes) sizes[i] = max(sizes[i], size_bits(number(row + i, c)));
        }
        const f32x16 largest = max(all(1e-30f), floats_of_bits(highest_of_each(sizes)));
        float factors[lanes];
        store(factors, most / largest);
        store(worth + row, largest / most + (largest - largest), count);  // infinity less infinity is no number
        for (int i = 0; i < count; ++i)
            for (std::int64_t c = 0; c < columns; c += integers_at_once)
                store_integers(integers + (row + i) * columns + c, number(row + i, c) * all(factors[i]),
                               number(row + i, c + lanes) * all(factors[i]));
    }
}

inline void widen(const bf16* from, std::int64_t count, std::int64_t padded, float* to) {
    for (std::int64_t i = 0; i < padded; i += lanes) {
        const std::int64_t here = std::min<std::int64_t>(lanes, std::max<std::int64_t>(0, count - i));
        store(to + i, here == lanes ? load(from + i) : load(from + i, int(here)));
    }
}

// ---- layouts ----------------------------------------------------------------------------------------------------------
//
// Of four codes, of neighbouring dimensions of a key or of neighbouring values, a word has the first and third as 16-bit
// integers, the next word the second and fourth. store_integers orders the other factor alike.

// 64 keys: [words of two codes][64 positions].
inline void pack_key_codes(const std::int8_t* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    for (std::int64_t d = 0; d < dim; d += 64, out += 2 * 16 * block_positions)
        for (int i = 0; i < block_positions; i += lanes) {
            Word fours[16][lanes];
            ahead.ask(i, lanes, d);
            transpose_words(rows + i, d, dim - d, fours[0], lanes);
            for (int c = 0; c < 16 && 4 * c < dim - d; ++c) {
                const i32x16 four = load_words(fours[c]);
                store_words(out + 2 * c * block_positions + i, even_codes(four));
                store_words(out + (2 * c + 1) * block_positions + i, odd_codes(four));
            }
        }
}

// 64 values: [64 positions in words of two codes][dim, a multiple of 16].
inline void pack_value_codes(const std::int8_t* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    const std::int64_t stride = rounded_up(dim, lanes);
    for (int i = 0; i < block_positions; i += 4, out += 2 * stride)
        for (std::int64_t d = 0; d < dim; d += 64) {
            i32x16 fours[4];
            ahead.ask(i, 4, d);
            interleave(rows + i, d, dim - d, fours);
            for (int v = 0; v < 4 && v * lanes < dim - d; ++v) {
                store_words(out + d + v * lanes, even_codes(fours[v]));
                store_words(out + stride + d + v * lanes, odd_codes(fours[v]));
            }
        }
}

}  // namespace kvloom
