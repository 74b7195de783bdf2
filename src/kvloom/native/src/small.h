// The small operations of a decoder layer, one row at a time and in one order: a row's result never depends on the
// rows beside it, nor on threads. Numbers are calculated with in float32, and rounded to the element's type where the
// modules of transformers round them.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd.h"

namespace kvloom {

// Sixteen elements at a time, and at last the rest.
template <class Function> inline void for_each_vector(std::int64_t count, Function function) {
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) function(i, lanes);
    if (i < count) function(i, int(count - i));
}

template <class Element> inline f32x16 get(const Element* p, int count) {
    return count == lanes ? load(p) : load(p, count);
}
template <class Element> inline void put(Element* p, f32x16 x, int count) {
    if (count == lanes) store(p, x);
    else store(p, x, count);
}

// As storing it in a tensor and loading it again would leave it.
template <class Element> inline f32x16 as_stored(f32x16 x) {
    if constexpr (std::is_same_v<Element, float>) return x;
    Element stored[lanes];
    store(stored, x);
    return load(stored);
}

template <class Element> inline float inverse_rms(const Element* x, std::int64_t columns, float epsilon) {
    f32x16 even = zeros(), odd = zeros();
    for_each_vector(columns, [&](std::int64_t i, int count) {
        const f32x16 own = get(x + i, count);
        f32x16& squares = (i / lanes) % 2 ? odd : even;
        squares = fma(own, own, squares);
    });
    return 1.0f / std::sqrt(sum(even + odd) / float(columns) + epsilon);
}

// out = weight * (x / rms(x)), where `out` may be `x`.
template <class Element>
inline void norm_row(const Element* x, const Element* weight, Element* out, std::int64_t columns, float epsilon) {
    const f32x16 factor = all(inverse_rms(x, columns, epsilon));
    for_each_vector(columns, [&](std::int64_t i, int count) {
        put(out + i, get(weight + i, count) * as_stored<Element>(get(x + i, count) * factor), count);
    });
}

// gate = silu(gate) * up
template <class Element> inline void silu_times_row(Element* gate, const Element* up, std::int64_t columns) {
    for_each_vector(columns, [&](std::int64_t i, int count) {
        const f32x16 x = get(gate + i, count);
        const f32x16 activated = as_stored<Element>(x / (all(1.0f) + exp(zeros() - x)));
        put(gate + i, activated * get(up + i, count), count);
    });
}

// Turns each head of one row by its position, after its norm where there is a weight.
template <class Element>
inline void rotate_row(Element* x, const Element* weight, float epsilon, const float* cosines, const float* sines,
                       std::int64_t heads, std::int64_t dim) {
    const std::int64_t half = dim / 2;
    for (std::int64_t head = 0; head < heads; ++head, x += dim) {
        if (weight) norm_row(x, weight, x, dim, epsilon);
        for_each_vector(half, [&](std::int64_t i, int count) {
            const f32x16 low = get(x + i, count), high = get(x + half + i, count);
            const f32x16 cosine = get(cosines + i, count), sine = get(sines + i, count);
            put(x + i, as_stored<Element>(low * cosine) - as_stored<Element>(high * sine), count);
            put(x + half + i, as_stored<Element>(high * cosine) + as_stored<Element>(low * sine), count);
        });
    }
}

// Cosine and sine of position * frequency, times `scaling`, rounded to the element's type and kept as floats. One by
// one: what a vectorised cosine gives may depend on where in its vector a number stands.
template <class Element>
inline void factors_row(std::int64_t position, const float* frequencies, float scaling, float* cosines, float* sines,
                        std::int64_t half) {
    for (std::int64_t i = 0; i < half; ++i) {
        const float angle = float(position) * frequencies[i];
        cosines[i] = rounded<Element>(std::cos(angle) * scaling);
        sines[i] = rounded<Element>(std::sin(angle) * scaling);
    }
}

// Calls `function` with a null pointer to the type that `dtype` names: 0 float32, 1 bfloat16, 2 float16.
template <class Function> inline void with_type(int dtype, Function function) {
    if (dtype == 0) function(static_cast<float*>(nullptr));
    else if (dtype == 1) function(static_cast<bf16*>(nullptr));
    else function(static_cast<f16*>(nullptr));
}

}  // namespace kvloom
