// Queries that are turned back, to be compared with keys as if they stood nearer: attention/turn.py in C++.
#pragma once

#include "small.h"

namespace kvloom {

// How the queries of a layer turn. Layout is that of a ctypes structure in attention/native.py.
struct Turn {
    const float *cosines, *sines;  // [shifts, pairs], of a schedule's shifts
    std::int64_t pairs, first;     // the first channel that turns
    std::int64_t interleaved;      // whether a pair is two neighbours, else channel i and channel i + pairs
};

// `to`, [dim], becomes `from` as if it stood a shift earlier.
template <class E> void turn_back(const E* from, std::int64_t dim, const Turn& turn, std::int32_t shift, E* to) {
    std::memcpy(to, from, std::size_t(dim) * sizeof(E));
    const float *cosines = turn.cosines + shift * turn.pairs, *sines = turn.sines + shift * turn.pairs;
    to += turn.first;
    if (turn.interleaved) {
        for (std::int64_t i = 0; i < turn.pairs; ++i) {
            const float one = to_float(to[2 * i]), other = to_float(to[2 * i + 1]);
            from_float(one * cosines[i] + other * sines[i], to[2 * i]);
            from_float(other * cosines[i] - one * sines[i], to[2 * i + 1]);
        }
        return;
    }
    for_each_vector(turn.pairs, [&](std::int64_t i, int count) {
        const f32x16 one = get(to + i, count), other = get(to + turn.pairs + i, count);
        const f32x16 cosine = get(cosines + i, count), sine = get(sines + i, count);
        put(to + i, one * cosine + other * sine, count);
        put(to + turn.pairs + i, other * cosine - one * sine, count);
    });
}

}  // namespace kvloom
