// Attention over the paged store.
//
// The order of a row's additions follows from the positions of the tokens that its sequence holds, and from nothing
// else. Position p is column p % 64 of block p / 64; four blocks are a partition. Scores are summed over the dimension
// in ascending order. Within a partition blocks are taken in ascending order with a running maximum (online softmax,
// Milakov and Gimelshein 2018); partitions are merged in ascending order by one formula. A column that a row does not
// see, or that holds no token, weighs an exact zero, and a block or partition of such columns changes no bit. So a row
// gives the same bits in a chunk and alone, in any batch, shared or copied, by any number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "codes.h"
#include "pack.h"
#include "schedule.h"
#include "simd.h"

namespace kvloom {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest = std::numeric_limits<float>::lowest();
constexpr float log2_e = 1.44269504f;
constexpr int block_vectors = block_positions / lanes;

// What registers hold of a product: rows times vectors sums, a vector of the right and a number of the left factor.
constexpr int strip_vectors = vector_registers >= 32 ? 4 : 1;
constexpr int strip_rows = vector_registers >= 32 ? 6 : vector_registers >= 8 ? 4 : 2;

// ---- functions ------------------------------------------------------------------------------------------------

// 2 ** x for x <= 0, within 1.5 units in the last place; an exact zero below -126, an exact one at zero; NaN stays NaN.
// x = n + r with |r| <= 0.5, and 2 ** r by a polynomial of degree 6 (relative error 2e-9).
inline f32x16 power(f32x16 x) {
    const f32x16 bounded = max(all(-126.0f), x);
    const f32x16 n = nearest(bounded);
    const f32x16 r = bounded - n;
    f32x16 p = all(1.53533620e-4f);
    p = fma(p, r, all(1.33988750e-3f));
    p = fma(p, r, all(9.61843692e-3f));
    p = fma(p, r, all(5.55033237e-2f));
    p = fma(p, r, all(2.40226477e-1f));
    p = fma(p, r, all(6.93147182e-1f));
    p = fma(p, r, all(1.0f));
    return where_not_less(x, all(-126.0f), scaled(p, n));
}

inline float power(float x) {
    float lane[lanes];
    store(lane, power(all(x)));
    return lane[0];
}

// The hyperbolic tangent, within 1e-7.
inline f32x16 tanh(f32x16 x) {
    const f32x16 negative = zeros() - x;
    const f32x16 e = power(max(x, negative) * all(-2 * log2_e));
    const f32x16 size = (all(1) - e) / (all(1) + e);
    return where_not_less(x, zeros(), size) - where_not_less(negative, zeros(), size);
}

inline void store_weights(float* weights, const f32x16* x) {
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) store(weights + v * lanes, x[v]);
}
inline void store_weights(bf16* weights, const f32x16* x) {
#if defined(KVLOOM_DOT_BF16)
#pragma GCC unroll 2
    for (int v = 0; v < block_vectors; v += 2)
        _mm512_storeu_si512(weights + v * lanes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[v + 1].v, x[v].v)));
#else
    for (int v = 0; v < block_vectors; ++v) store(weights + v * lanes, x[v]);
#endif
}

// ---- products of a strip of rows --------------------------------------------------------------------------------

inline f32x16 add_product(f32x16 sum, f32x16 a, f32x16 b) { return fma(a, b, sum); }
inline f32x16 add_product(f32x16 sum, bf16x32 a, bf16x32 b) { return dot_pairs(sum, a, b); }
inline f32x16 spread(const float* number) { return all(*number); }
inline bf16x32 spread(const bf16* pair) { return all_pairs(pair); }
inline f32x16 columns(const Word* words, float) { return load(reinterpret_cast<const float*>(words)); }
inline bf16x32 columns(const Word* words, bf16) { return load_pairs(reinterpret_cast<const bf16*>(words)); }

// Left [rows, words], right [words, columns], sums [rows, columns], each with the stride of its rows.
template <class P> struct Product {
    const P* left;
    std::int64_t left_stride;
    const Word* right;
    std::int64_t right_stride;
    std::int64_t words;
    float* sums;
    std::int64_t sums_stride;
    const float* factors;  // on the sums that were there before; if null they start from zero
};

template <class P, int rows, int vectors> void multiply(const Product<P>& product, std::int64_t column) {
    f32x16 sums[rows][vectors];
    float* before = product.sums + column;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            sums[r][v] = product.factors ? load(before + r * product.sums_stride + v * lanes) * all(product.factors[r]) : zeros();
    const P* left = product.left;
    const Word* right = product.right + column;
    for (std::int64_t k = 0; k < product.words; ++k, left += depth<P>, right += product.right_stride) {
        decltype(columns(right, P())) taken[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) taken[v] = columns(right + v * lanes, P());
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const auto number = spread(left + r * product.left_stride);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sums[r][v] = add_product(sums[r][v], number, taken[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store(before + r * product.sums_stride + v * lanes, sums[r][v]);
}

template <class P, int vectors, int most_rows = strip_rows>
void multiply_rows(const Product<P>& product, int rows, std::int64_t column) {
    if (rows == most_rows) multiply<P, most_rows, vectors>(product, column);
    else if constexpr (most_rows > 1) multiply_rows<P, vectors, most_rows - 1>(product, rows, column);
}

template <class P, int most_vectors = strip_vectors>
void multiply(const Product<P>& product, int rows, std::int64_t column, std::int64_t end) {
    for (; column + most_vectors * lanes <= end; column += most_vectors * lanes)
        multiply_rows<P, most_vectors>(product, rows, column);
    if constexpr (most_vectors > 1) multiply<P, most_vectors - 1>(product, rows, column, end);
}

// ---- where keys and values come from ------------------------------------------------------------------------------

// Arithmetic is on P. Rows of the store that are P are read where they lie; others are converted first.
template <class E> struct Arithmetic { using P = E; };
template <> struct Arithmetic<f16> { using P = float; };

template <class P> void copy(const P* from, std::int64_t count, P* to) { std::memcpy(to, from, std::size_t(count) * sizeof(P)); }
inline void copy(const f16* from, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; i += lanes) {
        const int here = int(std::min<std::int64_t>(lanes, count - i));
        store(to + i, load(from + i, here), here);
    }
}

template <class E> struct Loader {
    using P = typename Arithmetic<E>::P;
    const E* store;    // of one head
    std::int64_t dim;
    const P* nothing;  // zeros, for where no token is held
    P* converted;      // room for 64 rows

    Ahead ahead(const std::int32_t* slots) const {
        Ahead ahead;
        for (int i = 0; i < block_positions; ++i)
            if (slots[i] >= 0) ahead.rows[i] = reinterpret_cast<const char*>(store + slots[i] * dim);
        return ahead;
    }

    void rows(const std::int32_t* slots, const P** rows) const {
        for (int i = 0; i < block_positions; ++i) rows[i] = slots[i] < 0 ? nothing : row(store + slots[i] * dim, i);
    }

private:
    const P* row(const P* kept, int) const { return kept; }
    const float* row(const f16* kept, int i) const {
        copy(kept, dim, converted + i * dim);
        return converted + i * dim;
    }
};

// Whether `dim` numbers are all finite: of these, and of no others, zero times each is zero.
template <class P> bool finite(const P* row, std::int64_t dim) {
    f32x16 products = zeros();
    for (std::int64_t d = 0; d < dim; d += lanes)
        products = fma(load(row + d, int(std::min<std::int64_t>(lanes, dim - d))), zeros(), products);
    return sum(products) == 0;
}

// ---- one layer --------------------------------------------------------------------------------------------------

struct Shape {
    std::int64_t kv_heads, group, key_dim, value_dim;  // group: query heads that share a key head
    std::int64_t columns() const { return rounded_up(value_dim, lanes); }
    std::int64_t record() const { return columns() + lanes; }  // a row's sums, its maximum, its sum of weights
};

struct Layer {
    Schedule schedule;
    Shape shape;
    const void *queries, *keys, *values;  // keys and values of native strides
    std::int64_t query_token_stride, query_head_stride, key_head_stride, value_head_stride;  // in elements
    const Sealed *sealed_keys, *sealed_values;  // of the other strides; null if there are none
    const float* sinks;
    void* out;
    float scale, softcap;
};

// Strides of one set and one key head: all of them, and the result goes to `out`; or those of one partition, and a record
// for each row goes to the partial results, from `first_partial` on.
struct Item {
    const Set* set;
    std::int64_t head;
    const Stride *begin, *end;
    bool whole;
    std::int64_t first_partial;
    std::int64_t cost;
};

// Adds the partial result of a later partition to a row's total.
inline void merge(float* total, const float* partial, std::int64_t columns) {
    const float top = std::max(total[columns], partial[columns]);
    const float old = power(total[columns] - top), now = power(partial[columns] - top);
    for (std::int64_t c = 0; c < columns; c += lanes)
        store(total + c, fma(load(partial + c), all(now), load(total + c) * all(old)));
    total[columns] = top;
    total[columns + 1] = partial[columns + 1] * now + total[columns + 1] * old;
}

inline void clear(float* total, std::int64_t columns) {
    std::fill(total, total + columns, 0.0f);
    total[columns] = lowest;
    total[columns + 1] = 0;
}

// Divides, after the sink has taken its share: its weight is in the sum, and it has no value.
template <class E> void finish(float* total, const Layer& layer, const Token& token, std::int64_t head) {
    const std::int64_t columns = layer.shape.columns(), dim = layer.shape.value_dim;
    E* out = static_cast<E*>(layer.out) + (token.row * layer.shape.kv_heads * layer.shape.group + head) * dim;
    float factor = 1;
    if (layer.sinks) {
        const float sink = layer.sinks[head] * log2_e, top = std::max(total[columns], sink);
        factor = power(total[columns] - top);
        total[columns + 1] = total[columns + 1] * factor + power(sink - top);
    }
    for (std::int64_t c = 0; c < dim; c += lanes) {
        // Adding zero makes one zero of both: which of them a sum of nothing has depends on who was masked.
        const f32x16 result = load(total + c) * all(factor) / all(total[columns + 1]) + zeros();
        store(out + c, result, int(std::min<std::int64_t>(lanes, dim - c)));
    }
}

template <class P> struct Workspace {
    Word *keys, *values;              // the packed block
    P *nothing, *converted;           // see Loader
    P* queries;                       // [rows, key_dim in words]
    alignas(64) P weights[strip_rows][block_positions];
    alignas(64) float scores[strip_rows][block_positions];
    alignas(64) float column_scales[block_positions];  // of values that are codes
    std::int16_t* integers;           // queries for these, [rows of a strip, pieces, key_dim]
    float* room;                      // for one of them
    std::int32_t *low, *high;         // [rows], the positions that each sees
    float* tops;                      // [rows], the running maxima, of scores times log2(e)
    float* weight_sums;               // [rows, 16], added up when the partition ends
    float *sums, *totals;             // [rows, record]

    Workspace(const Shape& shape, std::int64_t rows, char* memory) {
        const std::int64_t key_dim = rounded_up(shape.key_dim, depth<P>), widest = std::max(shape.key_dim, shape.value_dim);
        take(memory, keys, block_positions * rounded_up(key_dim / depth<P>, lanes));
        take(memory, values, block_positions / depth<P> * shape.columns());
        take(memory, nothing, widest);
        take(memory, converted, block_positions * widest);
        take(memory, queries, rows * key_dim);
        take(memory, integers, strip_rows * pieces_at_once * rounded_up(shape.key_dim, lanes) + lanes);
        take(memory, room, rounded_up(shape.key_dim, lanes));
        take(memory, low, rows);
        take(memory, high, rows);
        take(memory, tops, rows + lanes);
        take(memory, weight_sums, rows * lanes);
        take(memory, sums, rows * shape.record());
        take(memory, totals, rows * shape.record());
        bytes = std::int64_t(memory - static_cast<char*>(nullptr));
    }

    std::int64_t bytes;  // if `memory` was null, how much is needed

private:
    template <class T> static void take(char*& memory, T*& part, std::int64_t count) {
        part = reinterpret_cast<T*>(memory);
        memory += rounded_up(count * std::int64_t(sizeof(T)), 64);
    }
};

template <class E> class Worker {
    using P = typename Arithmetic<E>::P;

public:
    Worker(const Layer& layer, char* memory)
        : layer_(layer), shape_(layer.shape),
          space_(shape_, layer.schedule.header->widest * shape_.group, memory),
          words_(rounded_up(shape_.key_dim, depth<P>) / depth<P>) {
        std::fill(space_.nothing, space_.nothing + std::max(shape_.key_dim, shape_.value_dim), P());
    }

    void run(const Item& item, float* partials) {
        const std::int64_t rows = item.set->tokens * shape_.group, columns = shape_.columns();
        tokens_ = layer_.schedule.tokens + item.set->first_token;
        keys_ = {static_cast<const E*>(layer_.keys) + item.head * layer_.key_head_stride, shape_.key_dim, space_.nothing, space_.converted};
        values_ = {static_cast<const E*>(layer_.values) + item.head * layer_.value_head_stride, shape_.value_dim, space_.nothing, space_.converted};
        if (layer_.sealed_keys) {
            sealed_keys_ = {*layer_.sealed_keys, item.head, shape_.key_dim};
            sealed_values_ = {*layer_.sealed_values, item.head, shape_.value_dim};
        }
        take_queries(item);
        rows_ = rows;
        see(item.begin < item.end && item.begin->native);
        if (item.whole)
            for (std::int64_t row = 0; row < rows; ++row) clear(space_.totals + row * shape_.record(), columns);
        for (const Stride* stride = item.begin; stride < item.end;) {
            start_partition(rows);
            const std::int32_t partition = stride->index / partition_blocks;
            for (; stride < item.end && stride->index / partition_blocks == partition; ++stride)
                take_block(*stride, stride + 1 < item.end && stride[1].native == stride->native ? slots_of(stride[1]) : nullptr);
            end_partition(rows, item.whole ? nullptr : partials + item.first_partial);
        }
        if (!item.whole) return;
        for (std::int64_t row = 0; row < rows; ++row)
            finish<E>(space_.totals + row * shape_.record(), layer_, tokens_[row / shape_.group], item.head * shape_.group + row % shape_.group);
    }

private:
    void take_queries(const Item& item) {
        P* to = space_.queries;
        for (std::int32_t token = 0; token < item.set->tokens; ++token)
            for (std::int64_t g = 0; g < shape_.group; ++g, to += words_ * depth<P>) {
                const E* from = static_cast<const E*>(layer_.queries) + tokens_[token].row * layer_.query_token_stride +
                                (item.head * shape_.group + g) * layer_.query_head_stride;
                copy(from, shape_.key_dim, to);
                if (shape_.key_dim < words_ * depth<P>) to[shape_.key_dim] = P();
            }
    }

    void start_partition(std::int64_t rows) {
        std::fill(space_.tops, space_.tops + rows, lowest);
        std::fill(space_.weight_sums, space_.weight_sums + rows * lanes, 0.0f);
        std::fill(space_.sums, space_.sums + rows * shape_.record(), 0.0f);
    }

    void end_partition(std::int64_t rows, float* partials) {
        const std::int64_t columns = shape_.columns(), record = shape_.record();
        for (std::int64_t row = 0; row < rows; ++row) {
            float* sums = space_.sums + row * record;
            sums[columns] = space_.tops[row];
            sums[columns + 1] = sum(load(space_.weight_sums + row * lanes));
            if (partials) std::copy(sums, sums + columns + 2, partials + row * record);
            else merge(space_.totals + row * record, sums, columns);
        }
    }

    const std::int32_t* slots_of(const Stride& stride) const {
        return layer_.schedule.slots + std::int64_t(stride.slots) * block_positions;
    }

    struct Seen { std::int32_t low, high; };  // both inclusive

    Seen seen_by(const Token& token) const {
        return native_ ? Seen{std::max(token.low, token.own), token.high} : Seen{token.low, token.own - 1};
    }

    // From now on strides are native ones, or of codes.
    void see(bool native) {
        native_ = native;
        for (std::int64_t row = 0; row < rows_; ++row) {
            const Seen seen = seen_by(tokens_[row / shape_.group]);
            space_.low[row] = seen.low;
            space_.high[row] = seen.high;
        }
    }

    // `next`: slots of the block that will be taken after this one, or null.
    void take_block(const Stride& stride, const std::int32_t* next) {
        if (bool(stride.native) != native_) see(stride.native);
        const std::int32_t* slots = slots_of(stride);
        const P* values[block_positions];
        pack(slots, next, values);
        const std::int64_t begin = stride.begin * shape_.group, end = stride.end * shape_.group;
        if (seen_by_all(stride, slots) || all_finite(values)) take_rows(stride.index, slots, begin, end);
        else for (std::int64_t row = begin; row < end; ++row) take_row_alone(stride.index, slots, row);
    }

    // `values`: where they were packed from.
    void pack(const std::int32_t* slots, const std::int32_t* next, const P** values) {
        const P* keys[block_positions];
        if (!native_ && keeps_codes) {
            const std::int8_t* rows[block_positions];
            const std::int8_t* nothing = reinterpret_cast<const std::int8_t*>(space_.nothing);
            pieces_.find(sealed_keys_, slots);
            sealed_keys_.rows(slots, nothing, rows);
            pack_codes(rows, shape_.key_dim, space_.keys, sealed_keys_.ahead(next));
            sealed_values_.rows(slots, nothing, rows);
            pack_code_pairs(rows, shape_.value_dim, space_.values, sealed_values_.ahead(next));
            sealed_values_.slot_scales(slots, space_.column_scales);
            return;
        }
        if (!native_) {
            sealed_keys_.rows(slots, space_.converted, space_.nothing, keys);
            pack_keys(keys, shape_.key_dim, space_.keys, Ahead());
            sealed_values_.rows(slots, space_.converted, space_.nothing, values);
            pack_values(values, shape_.value_dim, space_.values, Ahead());
            return;
        }
        keys_.rows(slots, keys);
        pack_keys(keys, shape_.key_dim, space_.keys, next ? keys_.ahead(next) : Ahead());
        values_.rows(slots, values);
        pack_values(values, shape_.value_dim, space_.values, next ? values_.ahead(next) : Ahead());
    }

    bool seen_by_all(const Stride& stride, const std::int32_t* slots) const {
        int first = 0, last = block_positions - 1;
        while (first < last && slots[first] < 0) ++first;
        while (last > first && slots[last] < 0) --last;
        const std::int32_t low = stride.index * block_positions + first, high = stride.index * block_positions + last;
        return std::all_of(tokens_ + stride.begin, tokens_ + stride.end, [=](const Token& token) {
            const Seen seen = seen_by(token);
            return seen.low <= low && seen.high >= high;
        });
    }

    bool all_finite(const P* const* values) const {
        if (!native_ && keeps_codes) return finite(space_.column_scales, block_positions);
        return std::all_of(values, values + block_positions, [&](const P* row) { return finite(row, shape_.value_dim); });
    }

    // A weight of zero hides no infinite value, so a row that must not see one reads a block without it.
    void take_row_alone(std::int32_t index, const std::int32_t* slots, std::int64_t row) {
        std::int32_t seen[block_positions];
        for (int i = 0; i < block_positions; ++i) {
            const std::int32_t position = index * block_positions + i;
            seen[i] = position < space_.low[row] || position > space_.high[row] ? -1 : slots[i];
        }
        const P* values[block_positions];
        pack(seen, nullptr, values);
        take_rows(index, seen, row, row + 1);
    }

    // Rows in strips of nearly equal heights.
    void take_rows(std::int32_t index, const std::int32_t* slots, std::int64_t begin, std::int64_t end) {
        const bool gaps = std::any_of(slots, slots + block_positions, [](std::int32_t slot) { return slot < 0; });
        for (std::int64_t strips = (end - begin + strip_rows - 1) / strip_rows; begin < end; --strips) {
            const int rows = int((end - begin + strips - 1) / strips);
            if (sees_any(index, begin, rows)) take_strip(index, gaps ? slots : nullptr, begin, rows);
            begin += rows;
        }
    }

    bool sees_any(std::int32_t index, std::int64_t row, int rows) const {
        bool any = false;
        for (std::int64_t r = row; r < row + rows; ++r)
            any |= space_.low[r] < (index + 1) * block_positions && space_.high[r] >= index * block_positions;
        return any;
    }

    void take_strip(std::int32_t index, const std::int32_t* slots, std::int64_t row, int rows) {
        const Product<P> scores{space_.queries + row * words_ * depth<P>, words_ * depth<P>, space_.keys, block_positions,
                                words_, space_.scores[0], block_positions, nullptr};
        if (!native_ && keeps_codes) score_codes(row, rows);
        else multiply(scores, rows, 0, block_positions);
        float factors[lanes];
        weigh(index, slots, row, rows, factors);
        const Product<P> sums{space_.weights[0], block_positions, space_.values, shape_.columns(),
                              block_positions / depth<P>, space_.sums + row * shape_.record(), shape_.record(), factors};
        multiply(sums, rows, 0, shape_.columns());
    }

    // Scores of codes, by integers.
    void score_codes(std::int64_t row, int rows) {
        const std::int64_t words = code_words(shape_.key_dim), padded = words * 4;
        for (int done = 0; done < pieces_.count; done += pieces_at_once) {
            const Piece* pieces = pieces_.pieces + done;
            const int count = std::min(pieces_at_once, pieces_.count - done);
            float worth[strip_rows * pieces_at_once];
            for (int r = 0; r < rows; ++r)
                for (int p = 0; p < count; ++p)
                    worth[r * pieces_at_once + p] = quantize(
                        reinterpret_cast<const bf16*>(space_.queries + (row + r) * words_ * depth<P>), pieces[p].scales, shape_.key_dim,
                        space_.room, space_.integers + (r * pieces_at_once + p) * padded);
            score<strip_rows>(rows, space_.keys, words, space_.integers, worth, pieces, count, space_.scores[0]);
        }
    }

    // Scores become weights; `factors` say by how much what was added up before must shrink.
    void weigh(std::int32_t index, const std::int32_t* slots, std::int64_t row, int rows, float* factors) {
        float tops[lanes] = {}, differences[lanes] = {};
        for (int r = 0; r < rows; ++r) {
            float* scores = space_.scores[r];
            f32x16 x[block_vectors];
#pragma GCC unroll 4
            for (int v = 0; v < block_vectors; ++v) store(scores + v * lanes, x[v] = scaled_score(load(scores + v * lanes)));
            if (hide(scores, slots, space_.low[row + r] - index * block_positions, space_.high[row + r] - index * block_positions))
    #pragma GCC unroll 4
            for (int v = 0; v < block_vectors; ++v) x[v] = load(scores + v * lanes);
            tops[r] = std::max(space_.tops[row + r], highest(max(max(x[0], x[1]), max(x[2], x[3]))));
            differences[r] = space_.tops[row + r] - tops[r];
            space_.tops[row + r] = tops[r];
        }
        store(factors, power(load(differences)));
        for (int r = 0; r < rows; ++r) {
            f32x16 x[block_vectors];
#pragma GCC unroll 4
            for (int v = 0; v < block_vectors; ++v) x[v] = power(load(space_.scores[r] + v * lanes) - all(tops[r]));
            float* sums = space_.weight_sums + (row + r) * lanes;
            store(sums, fma(load(sums), all(factors[r]), (x[0] + x[1]) + (x[2] + x[3])));
            if (!native_ && keeps_codes)
#pragma GCC unroll 4
                for (int v = 0; v < block_vectors; ++v) x[v] = x[v] * load(space_.column_scales + v * lanes);
            store_weights(space_.weights[r], x);
        }
    }

    f32x16 scaled_score(f32x16 x) const {
        if (layer_.softcap == 0) return x * all(layer_.scale * log2_e);
        return tanh(x * all(layer_.scale / layer_.softcap)) * all(layer_.softcap * log2_e);
    }

    // Minus infinity where a row sees nothing, outside of the columns `low` to `high`; says whether there was such a place.
    static bool hide(float* scores, const std::int32_t* slots, std::int32_t low, std::int32_t high) {
        if (low <= 0 && high >= block_positions - 1 && !slots) return false;
        for (int i = 0; i < block_positions; ++i)
            if (i < low || i > high || (slots && slots[i] < 0)) scores[i] = -infinity;
        return true;
    }

    const Layer& layer_;
    const Shape& shape_;
    Workspace<P> space_;
    const std::int64_t words_;  // of a key
    const Token* tokens_ = nullptr;
    std::int64_t rows_ = 0;
    bool native_ = true;
    static constexpr bool keeps_codes = std::is_same_v<E, bf16>;  // multiplies them as they are
    Pieces pieces_;
    Loader<E> keys_{}, values_{};
    Codes sealed_keys_{}, sealed_values_{};
};

// ---- the work of a layer, divided ---------------------------------------------------------------------------------

// A block costs as much to lay out as some rows cost to multiply.
constexpr std::int64_t packing_rows = 6;

std::int64_t cost(const Stride* begin, const Stride* end, std::int64_t group) {
    std::int64_t rows = 0;
    for (; begin < end; ++begin) rows += (begin->end - begin->begin) * group + packing_rows;
    return rows;
}

const Stride* partition_end(const Stride* stride, const Stride* end) {
    const std::int32_t partition = stride->index / partition_blocks;
    while (stride < end && stride->index / partition_blocks == partition) ++stride;
    return stride;
}

// Partial results of a set and a head, in the order of partitions.
struct Split {
    const Set* set;
    std::int64_t head, partitions, first_partial;
};

class Division {
public:
    std::vector<Item> items;    // the largest first
    std::vector<Split> splits;
    std::int64_t partials = 0;  // floats

    Division(const Schedule& schedule, const Shape& shape, std::int64_t threads) {
        const Set *begin = schedule.sets, *end = begin + schedule.header->sets;
        std::int64_t total = 0, largest = 0;
        for (const Set* set = begin; set < end; ++set) {
            const Stride* strides = schedule.strides + set->first_stride;
            const std::int64_t own = cost(strides, strides + set->strides, shape.group);
            total += own * shape.kv_heads;
            largest = std::max(largest, own);
        }
        const std::int64_t whole = schedule.header->sets * shape.kv_heads;
        const bool even = schedule.header->sets == 1 && whole % threads == 0;
        const std::int64_t share = even ? largest : total / (4 * threads);
        for (const Set* set = begin; set < end; ++set)
            for (std::int64_t head = 0; head < shape.kv_heads; ++head) add(schedule, shape, set, head, share);
        std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
    }

private:
    void add(const Schedule& schedule, const Shape& shape, const Set* set, std::int64_t head, std::int64_t share) {
        const Stride *begin = schedule.strides + set->first_stride, *end = begin + set->strides;
        const std::int64_t own = cost(begin, end, shape.group);
        if (own <= share || begin == end || partition_end(begin, end) == end) {
            items.push_back({set, head, begin, end, true, 0, own});
            return;
        }
        splits.push_back({set, head, 0, partials});
        for (const Stride* next; begin < end; begin = next, ++splits.back().partitions) {
            next = partition_end(begin, end);
            items.push_back({set, head, begin, next, false, partials, cost(begin, next, shape.group)});
            partials += set->tokens * shape.group * shape.record();
        }
    }
};

template <class E> void merge_split(const Split& split, const Layer& layer, const float* partials, float* total) {
    const Shape& shape = layer.shape;
    const std::int64_t rows = split.set->tokens * shape.group;
    for (std::int64_t row = 0; row < rows; ++row) {
        clear(total, shape.columns());
        for (std::int64_t p = 0; p < split.partitions; ++p)
            merge(total, partials + split.first_partial + (p * rows + row) * shape.record(), shape.columns());
        const Token& token = layer.schedule.tokens[split.set->first_token + row / shape.group];
        finish<E>(total, layer, token, split.head * shape.group + row % shape.group);
    }
}

template <class E> std::int64_t worker_bytes(const Schedule& schedule, const Shape& shape) {
    return Workspace<typename Arithmetic<E>::P>(shape, schedule.header->widest * shape.group, nullptr).bytes;
}

template <class E> void attend(const Layer& layer, char* memory, int threads) {
    const Division division(layer.schedule, layer.shape, threads);
    const std::int64_t bytes = worker_bytes<E>(layer.schedule, layer.shape);
    float* partials = reinterpret_cast<float*>(memory + bytes * threads);
    const std::int64_t items = std::int64_t(division.items.size()), splits = std::int64_t(division.splits.size());
#pragma omp parallel num_threads(threads)
    {
        char* own = memory + bytes * omp_get_thread_num();
        Worker<E> worker(layer, own);
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < items; ++i) worker.run(division.items[i], partials);
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < splits; ++i) merge_split<E>(division.splits[i], layer, partials, reinterpret_cast<float*>(own));
    }
}

template <class E> void write(
    E* store, std::int64_t store_head_stride, const E* rows, std::int64_t head_stride, std::int64_t token_stride,
    const std::int64_t* slots, std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
    for (std::int64_t head = 0; head < heads; ++head)
        for (std::int64_t token = 0; token < tokens; ++token)
            std::memcpy(store + head * store_head_stride + slots[token] * dim, rows + head * head_stride + token * token_stride, std::size_t(dim) * sizeof(E));
}

// Calls `function` with a null pointer to the type of the elements: 0 is float32, 1 bfloat16, 2 float16.
template <class Function> auto with_element(int element, Function function) {
    if (element == 1) return function(static_cast<bf16*>(nullptr));
    if (element == 2) return function(static_cast<f16*>(nullptr));
    return function(static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace kvloom

using namespace kvloom;

// How many bytes of memory `kvloom_attend` wants to work in.
KVLOOM_EXPORT std::int64_t kvloom_attention_bytes(
    int element, const std::int32_t* schedule, std::int64_t kv_heads, std::int64_t group, std::int64_t key_dim,
    std::int64_t value_dim, int threads) {
    const Shape shape{kv_heads, group, key_dim, value_dim};
    const Schedule parts(schedule);
    const std::int64_t each = with_element(element, [&](auto* e) { return worker_bytes<std::remove_pointer_t<decltype(e)>>(parts, shape); });
    return each * threads + Division(parts, shape, threads).partials * std::int64_t(sizeof(float));
}

// Attention of a step's new tokens in one layer. `queries` [tokens, kv_heads * group, key_dim] with strides in elements, `keys`
// and `values` [kv_heads, slots, dim] with a stride from head to head, `out` [tokens, kv_heads * group, value_dim].
// `sealed`: where blocks are sealed, the codes of keys and of values, and `keys` and `values` hold the step's own blocks.
// `sinks`: one score for each query head, or null. `softcap`: 0 if there is none. `memory` is aligned to 64 bytes.
KVLOOM_EXPORT void kvloom_attend(
    int element, const std::int32_t* schedule, std::int64_t kv_heads, std::int64_t group, std::int64_t key_dim,
    std::int64_t value_dim, const void* queries, std::int64_t query_token_stride, std::int64_t query_head_stride,
    const void* keys, std::int64_t key_head_stride, const void* values, std::int64_t value_head_stride,
    const Sealed* sealed, const float* sinks, float scale, float softcap, void* out, void* memory, int threads) {
    const Layer layer{Schedule(schedule), {kv_heads, group, key_dim, value_dim}, queries, keys, values, query_token_stride,
                      query_head_stride, key_head_stride, value_head_stride, sealed, sealed ? sealed + 1 : nullptr, sinks, out,
                      scale, softcap};
    with_element(element, [&](auto* e) { attend<std::remove_pointer_t<decltype(e)>>(layer, static_cast<char*>(memory), threads); });
}

// New rows [heads, tokens, dim], with strides in elements, into their slots of a store [heads, slots, dim].
KVLOOM_EXPORT void kvloom_write(
    int bytes, void* store, std::int64_t store_head_stride, const void* rows, std::int64_t head_stride, std::int64_t token_stride,
    const std::int64_t* slots, std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
    if (bytes == 4) write(static_cast<float*>(store), store_head_stride, static_cast<const float*>(rows), head_stride, token_stride, slots, tokens, heads, dim);
    else write(static_cast<bf16*>(store), store_head_stride, static_cast<const bf16*>(rows), head_stride, token_stride, slots, tokens, heads, dim);
}
