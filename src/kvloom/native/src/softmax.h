// Online softmax: its functions, and how partial results of a row are put together (Milakov and Gimelshein 2018).
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"

namespace kvloom {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest = std::numeric_limits<float>::lowest();
constexpr float log2_e = 1.44269504f;

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

// A record of a row: its sums over values, the maximum of its scores (times log2 e), the sum of its weights.

inline void clear(float* total, std::int64_t columns) {
    std::fill(total, total + columns, 0.0f);
    total[columns] = lowest;
    total[columns + 1] = 0;
}

// Adds the record of a later partition to a row's total.
inline void merge(float* total, const float* partial, std::int64_t columns) {
    const float top = std::max(total[columns], partial[columns]);
    const float old = power(total[columns] - top), now = power(partial[columns] - top);
    for (std::int64_t c = 0; c < columns; c += lanes)
        store(total + c, fma(load(partial + c), all(now), load(total + c) * all(old)));
    total[columns] = top;
    total[columns + 1] = partial[columns + 1] * now + total[columns + 1] * old;
}

// Divides, after the sink has taken its share: its weight is in the sum, and it has no value.
template <class E> void finish(float* total, const Layer& layer, const Token& token, std::int64_t head) {
    const std::int64_t columns = layer.shape.columns(), dim = layer.shape.value_dim;
    E* out = static_cast<E*>(layer.out) + (token.row * layer.shape.kv_heads * layer.shape.group + head) * dim;
    float factor = 1;
    if (layer.sinks) {
        const float sink = layer.sinks[head] * log2_e, top = std::max(total[columns], sink);
        factor = power(total[columns] - top);
        total[columns] = top;
        total[columns + 1] = total[columns + 1] * factor + power(sink - top);
    }
    if (layer.peaks)
        layer.peaks[token.row * layer.shape.kv_heads * layer.shape.group + head] = {total[columns], 1 / total[columns + 1]};
    for (std::int64_t c = 0; c < dim; c += lanes) {
        // Adding zero makes one zero of both: which of them a sum of nothing has depends on who was masked.
        const f32x16 result = load(total + c) * all(factor) / all(total[columns + 1]) + zeros();
        store(out + c, result, int(std::min<std::int64_t>(lanes, dim - c)));
    }
}

}  // namespace kvloom
