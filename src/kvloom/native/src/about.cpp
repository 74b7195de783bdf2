// What the library was compiled for, and how fast this machine reads memory.

#include <algorithm>

#include <omp.h>

#include "simd.h"

using namespace kvloom;

KVLOOM_EXPORT const char* kvloom_instructions() { return instructions; }

KVLOOM_EXPORT int kvloom_has_float16() { return has_f16; }

// Reads `count` floats once, with `threads` threads, each its own contiguous part. The sum is there to need them all.
KVLOOM_EXPORT float kvloom_read(const float* numbers, std::int64_t count, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const std::int64_t part = count / (lanes * 4) / omp_get_num_threads() * (lanes * 4);
        const float* p = numbers + part * omp_get_thread_num();
        f32x16 a = zeros(), b = zeros(), c = zeros(), d = zeros();
        for (const float* end = p + part; p < end; p += lanes * 4) {
            a = a + load(p);
            b = b + load(p + lanes);
            c = c + load(p + lanes * 2);
            d = d + load(p + lanes * 3);
        }
        total += sum((a + b) + (c + d));
    }
    return total;
}

// For tests of the vectors themselves: exp, sum and highest of sixteen floats.
KVLOOM_EXPORT void kvloom_vector_check(const float* x, float* exponentials, float* total, float* largest) {
    store(exponentials, exp(load(x)));
    *total = sum(load(x));
    *largest = highest(load(x));
}

// For tests: `count` floats to bfloat16 and back, sixteen at a time and the rest alone.
KVLOOM_EXPORT void kvloom_round_bf16(const float* x, bf16* y, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += lanes) {
        const int here = int(std::min<std::int64_t>(lanes, count - i));
        store(y + i, load(x + i, here), here);
    }
}
