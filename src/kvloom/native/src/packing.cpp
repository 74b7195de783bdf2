#include "packing.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvloom {
namespace {

template <class Element>
void pack(const Element* plain, std::int64_t outputs, std::int64_t inner, Element* packed) {
    constexpr int depth = depth_of<Element>;
    const std::int64_t tile = tile_elements<Element>(inner);
#pragma omp for
    for (std::int64_t t = 0; t < ceil_div(outputs, lanes); ++t) {
        Element* to = packed + t * tile;
        for (std::int64_t line = 0; line < tile / lanes / depth; ++line)
            for (std::int64_t n = t * lanes; n < (t + 1) * lanes; ++n)
                for (std::int64_t k = line * depth; k < (line + 1) * depth; ++k)
                    *to++ = n < outputs && k < inner ? plain[n * inner + k] : Element{};
    }
}

template <class Element>
void look_up(const Element* packed, std::int64_t inner, const std::int64_t* ids, std::int64_t count, Element* rows) {
    constexpr int depth = depth_of<Element>;
    const std::int64_t tile = tile_elements<Element>(inner);
#pragma omp for
    for (std::int64_t r = 0; r < count; ++r) {
        const Element* from = packed + ids[r] / lanes * tile + ids[r] % lanes * depth;
        for (std::int64_t k = 0; k < inner; ++k) rows[r * inner + k] = from[k / depth * depth * lanes + k % depth];
    }
}

}  // namespace

void look_up(int dtype, const void* packed, std::int64_t inner, const std::int64_t* ids, std::int64_t count, void* rows) {
    // Moving numbers needs their size alone, and where a line begins.
    if (dtype == bfloat16) look_up((const bf16*)packed, inner, ids, count, (bf16*)rows);
    else if (dtype == float16) look_up((const f16*)packed, inner, ids, count, (f16*)rows);
    else look_up((const float*)packed, inner, ids, count, (float*)rows);
}

}  // namespace kvloom

using namespace kvloom;

// Elements of a packed weight, filled up to whole tiles and lines.
KVLOOM_EXPORT std::int64_t kvloom_packed_elements(int dtype, std::int64_t outputs, std::int64_t inner) {
    return ceil_div(outputs, lanes) * (dtype == bfloat16 ? tile_elements<bf16>(inner) : tile_elements<float>(inner));
}

KVLOOM_EXPORT void kvloom_pack(int dtype, const void* plain, std::int64_t outputs, std::int64_t inner, void* packed,
                               int threads) {
#pragma omp parallel num_threads(threads)
    if (dtype == bfloat16) pack((const bf16*)plain, outputs, inner, (bf16*)packed);
    else if (dtype == float16) pack((const f16*)plain, outputs, inner, (f16*)packed);
    else pack((const float*)plain, outputs, inner, (float*)packed);
}

// 0, or 1 if an id is not that of an output; then nothing is written.
KVLOOM_EXPORT int kvloom_look_up(int dtype, const void* packed, std::int64_t outputs, std::int64_t inner,
                                 const std::int64_t* ids, std::int64_t count, void* rows, int threads) {
    for (std::int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= outputs) return 1;
#pragma omp parallel num_threads(threads)
    look_up(dtype, packed, inner, ids, count, rows);
    return 0;
}

// To be called before memory is first written: pages of 2 MiB, as far as they fit in, are read faster. If they are refused, small
// ones serve.
KVLOOM_EXPORT void kvloom_ask_for_large_pages(void* memory, std::int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = 1 << 21;
    const std::uintptr_t from = (std::uintptr_t(memory) + page - 1) / page * page;
    const std::uintptr_t until = (std::uintptr_t(memory) + bytes) / page * page;
    if (from < until) madvise(reinterpret_cast<void*>(from), until - from, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}
