// One block of 64 positions, as strips of rows meet it: scores first, then weights times values.
//
// A block is packed for many rows, and read as it lies by few.
#pragma once

#include "few_rows.h"
#include "integers.h"
#include "kept.h"
#include "product.h"
#include "workspace.h"

namespace kvloom {

constexpr int block_vectors = block_positions / lanes;

// Where a block is read from.
template <class E> struct Block {
    const Head<E>* head;
    const std::int32_t* slots;
    bool native;         // or codes
    const Place* place;  // of its slots
    const Place* next;   // what is read after it, or null
    bool has_values = true;  // or nobody will ask for them

    Ahead next_keys() const { return {next ? next->keys : nullptr}; }
    Ahead next_values() const { return {next ? next->values : nullptr}; }
};

inline void store_weights(float* weights, const f32x16* x) {
    for (int v = 0; v < block_vectors; ++v) store(weights + v * lanes, x[v]);
}
inline void store_weights(bf16* weights, const f32x16* x) {
#if defined(KVLOOM_DOT_BF16)
    for (int v = 0; v < block_vectors; v += 2)
        _mm512_storeu_si512(weights + v * lanes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[v + 1].v, x[v].v)));
#else
    for (int v = 0; v < block_vectors; ++v) store(weights + v * lanes, x[v]);
#endif
}

template <class E> class NumberBlock {
    using P = typename Arithmetic<E>::P;

public:
    NumberBlock(const Shape& shape, Workspace<P>& space) : shape_(shape), space_(space) {}

    // There are other queries now.
    void begin() { interleaved_rows_ = 0; }

    // The block at a place, for so many rows in all.
    void read(const Block<E>& block, std::int64_t rows) {
        if (!block.native) decode(block);
        else if constexpr (std::is_same_v<E, f16>) {
            numbers_of_f16(block.place->keys, shape_.key_dim, space_.nothing, space_.converted_keys, keys_);
            if (block.has_values) numbers_of_f16(block.place->values, shape_.value_dim, space_.nothing, space_.converted_values, values_);
        } else {
            std::copy_n(reinterpret_cast<const P* const*>(block.place->keys), block_positions, keys_);
            std::copy_n(reinterpret_cast<const P* const*>(block.place->values), block_positions, values_);
        }
        next_keys_ = block.next_keys();
        next_values_ = block.next_values();
        packed_ = rows > few_rows;
        if (!packed_) return;
        pack_keys(keys_, shape_.key_dim, space_.keys, next_keys_);
        if (block.has_values) pack_values(values_, shape_.value_dim, space_.values, next_values_);
    }

    // Of one strip, if there are so many in all.
    static int most_rows_for(std::int64_t rows) { return rows > few_rows ? strip_rows<P> : few_rows; }

    // Whether a weight of zero hides every value.
    bool finite() const {
        return std::all_of(values_, values_ + block_positions, [&](const P* row) { return kvloom::finite(row, shape_.value_dim); });
    }

    void score(std::int64_t row, int rows) {
        const std::int64_t words = rounded_up(shape_.key_dim, depth<P>) / depth<P>, stride = words * depth<P>;
        const P* queries = space_.queries + row * stride;
        if (packed_)
            return multiply(Product<P>{queries, stride, space_.keys, block_positions, words, space_.scores[0], block_positions, nullptr, nullptr},
                            rows, block_positions);
#if defined(__AVX512F__)
        if (row != interleaved_row_ || rows != interleaved_rows_) interleave_rows(queries, words, rows, space_.few_queries);
        interleaved_row_ = row, interleaved_rows_ = rows;
        with_rows<few_rows>(rows, [&](auto r) {
            score_few<P, r>(keys_, shape_.key_dim, space_.few_queries, space_.scores[0], next_keys_);
        });
#endif
    }

    void keep_weights(int r, const f32x16* weights) { store_weights(space_.weights[r], weights); }

    void add_values(std::int64_t row, int rows, const float* factors) {
        float* sums = space_.sums + row * shape_.record();
        if (packed_)
            return multiply(Product<P>{space_.weights[0], block_positions, space_.values, shape_.columns(), block_positions / depth<P>,
                                       sums, shape_.record(), factors, nullptr},
                            rows, shape_.columns());
#if defined(__AVX512F__)
        with_rows<few_rows>(rows, [&](auto r) {
            add_few<P, r>(values_, shape_.value_dim, space_.weights[0], sums, shape_.record(), factors, next_values_);
        });
#endif
    }

private:
    void decode(const Block<E>& block) {
        if constexpr (std::is_same_v<P, float>) {
            numbers_of_codes(block.place->keys, block.slots, block.head->key_scales, space_.nothing, space_.converted_keys, keys_);
            if (block.has_values) numbers_of_codes(block.place->values, block.slots, block.head->value_scales, space_.nothing, space_.converted_values, values_);
        }
    }

    const Shape& shape_;
    Workspace<P>& space_;
    const P *keys_[block_positions], *values_[block_positions];
    Ahead next_keys_, next_values_;
    bool packed_ = false;
    std::int64_t interleaved_row_ = 0;
    int interleaved_rows_ = 0;
};

// Codes in a cache of bfloat16, which are multiplied as they are.
class CodeBlock {
public:
    CodeBlock(const Shape& shape, Workspace<bf16>& space) : shape_(shape), space_(space) {}

    // The block at a place, for so many rows in all.
    void read(const Block<bf16>& block, std::int64_t rows) {
        keys_ = reinterpret_cast<const std::int8_t* const*>(block.place->keys);
        values_ = reinterpret_cast<const std::int8_t* const*>(block.place->values);
        next_keys_ = block.next_keys();
        next_values_ = block.next_values();
        pieces_.find(block.head->key_scales, block.slots);
        if (block.has_values) block.head->value_scales.of_slots(block.slots, space_.column_scales);
        packed_ = rows > few_rows || !pieces_.are_vectors() || padded() > few_stride;
        if (!packed_) return;
        pack_key_codes(keys_, shape_.key_dim, space_.keys, next_keys_);
        if (block.has_values) pack_value_codes(values_, shape_.value_dim, space_.values, next_values_);
    }

    static int most_rows_for(std::int64_t) { return strip_rows<std::int16_t>; }

    bool finite() const { return kvloom::finite(space_.column_scales, block_positions); }

    void score(std::int64_t row, int rows) {
        const std::int64_t stride = packed_ ? padded() : few_stride;
        for (int done = 0; done < pieces_.count; done += pieces_at_once) {
            const int count = std::min(pieces_at_once, pieces_.count - done);
            float worth[pieces_at_once * most_rows];
            round_queries(space_.wide_queries + row * padded(), rows, pieces_.pieces + done, count, stride, worth);
            for (int p = 0; p < count; ++p) score_piece(done + p, space_.integers + p * rows * stride, worth + p * rows, rows);
        }
    }

    void keep_weights(int r, const f32x16* weights) {
        for (int v = 0; v < block_vectors; ++v) store(space_.wide_weights[r] + v * lanes, weights[v] * load(space_.column_scales + v * lanes));
    }

    void add_values(std::int64_t row, int rows, const float* factors) {
        float worth[lanes];
        float* sums = space_.sums + row * shape_.record();
        round_rows(rows, block_positions, block_positions, block_positions, space_.integer_weights[0], worth, [&](int r) {
            return [weights = space_.wide_weights[r]](std::int64_t i) { return load(weights + i); };
        });
        if (packed_)
            return multiply(Product<std::int16_t>{space_.integer_weights[0], block_positions, space_.values, shape_.columns(),
                                                  block_positions / 2, sums, shape_.record(), factors, worth},
                            rows, shape_.columns());
#if defined(__AVX512F__)
        with_rows<few_rows>(rows, [&](auto r) {
            add_few_codes<r>(values_, shape_.value_dim, space_.integer_weights[0], worth, sums, shape_.record(), factors, next_values_);
        });
#endif
    }

private:
    std::int64_t padded() const { return rounded_up(shape_.key_dim, integers_at_once); }

    // Queries times the scales of some pieces, as integers [pieces, rows, stride].
    void round_queries(const float* queries, int rows, const Piece* pieces, int count, std::int64_t stride, float* worth) {
        const std::int64_t padded = this->padded();
        struct Row { const float *query, *scales; } of[pieces_at_once * most_rows];
        for (int p = 0; p < count; ++p) {
            widen(pieces[p].scales, shape_.key_dim, padded, space_.scales + p * padded);
            for (int r = 0; r < rows; ++r) of[p * rows + r] = {queries + r * padded, space_.scales + p * padded};
        }
        round_rows(count * rows, padded, stride, shape_.key_dim, space_.integers, worth, [&](int i) {
            return [own = of[i]](std::int64_t d) { return load(own.query + d) * load(own.scales + d); };
        });
    }

    void score_piece(int index, const std::int16_t* queries, const float* worth, int rows) {
        const Piece& piece = pieces_.pieces[index];
        const std::int64_t words = rounded_up(shape_.key_dim, 4) / 2;
        float* scores = space_.scores[0] + piece.vector * lanes;
#if defined(__AVX512F__)
        if (!packed_) {
            for (std::int64_t d = 0; d < shape_.key_dim; d += 64) next_keys_.ask(piece.vector * lanes, lanes, d);
            return with_rows<few_rows>(rows, [&](auto r) {
                score_few_codes<r>(keys_ + piece.vector * lanes, shape_.key_dim, queries, worth, scores);
            });
        }
#endif
        float room[most_rows][lanes];
        const bool alone = pieces_.is_alone(index);
        const Product<std::int16_t> product{queries, padded(), space_.keys + piece.vector * lanes, block_positions, words,
                                            alone ? scores : room[0], alone ? block_positions : lanes, nullptr, worth};
        multiply(product, rows, lanes);
        for (int r = 0; !alone && r < rows; ++r)
            std::copy(room[r] + piece.first, room[r] + piece.end, scores + r * block_positions + piece.first);
    }

    const Shape& shape_;
    Workspace<bf16>& space_;
    const std::int8_t *const *keys_ = nullptr, *const *values_ = nullptr;
    Ahead next_keys_, next_values_;
    Pieces pieces_;
    bool packed_ = false;
};

}  // namespace kvloom
