// The small operations by themselves, on contiguous rows. `dtype` is that of the elements, as in linear.h.

#include "small.h"

using namespace kvloom;

namespace {

// Below this many elements a second thread costs more than it brings.
constexpr std::int64_t min_parallel = 1 << 15;

template <class Function>
void for_each_row(std::int64_t rows, std::int64_t elements_of_a_row, int threads, Function function) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1 && rows * elements_of_a_row >= min_parallel)
    for (std::int64_t row = 0; row < rows; ++row) function(row);
}

}  // namespace

// out = weight * (x / rms(x)) for each row.
KVLOOM_EXPORT void kvloom_rms_norm(int dtype, const void* x, const void* weight, void* out, std::int64_t rows,
                                   std::int64_t columns, float epsilon, int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        for_each_row(rows, columns, threads, [&](std::int64_t row) {
            norm_row(static_cast<const Element*>(x) + row * columns, static_cast<const Element*>(weight),
                     static_cast<Element*>(out) + row * columns, columns, epsilon);
        });
    });
}

// gate = silu(gate) * up
KVLOOM_EXPORT void kvloom_silu_times(int dtype, void* gate, const void* up, std::int64_t rows, std::int64_t columns,
                                     int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        for_each_row(rows, 8 * columns, threads, [&](std::int64_t row) {
            silu_times_row(static_cast<Element*>(gate) + row * columns, static_cast<const Element*>(up) + row * columns,
                           columns);
        });
    });
}

// cosines, sines: float[rows, half]
KVLOOM_EXPORT void kvloom_rotary_factors(int dtype, const std::int64_t* positions, const float* frequencies,
                                         float scaling, float* cosines, float* sines, std::int64_t rows,
                                         std::int64_t half, int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        for_each_row(rows, 64 * half, threads, [&](std::int64_t row) {
            factors_row<Element>(positions[row], frequencies, scaling, cosines + row * half, sines + row * half, half);
        });
    });
}

// Turns x[rows, heads, dim] in place, after a norm of each head where there is a weight.
KVLOOM_EXPORT void kvloom_rotate(int dtype, void* x, const void* weight, float epsilon, const float* cosines,
                                 const float* sines, std::int64_t rows, std::int64_t heads, std::int64_t dim,
                                 int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        for_each_row(rows, 4 * heads * dim, threads, [&](std::int64_t row) {
            rotate_row(static_cast<Element*>(x) + row * heads * dim, static_cast<const Element*>(weight), epsilon,
                       cosines + row * (dim / 2), sines + row * (dim / 2), heads, dim);
        });
    });
}
