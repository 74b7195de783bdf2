// Sixteen slots at a time: finding where a block lies must cost little beside reading it.
#pragma once

#include "schedule.h"
#include "simd.h"

namespace kvloom {

// Whether sixteen slots, none of them empty, follow each other.
inline bool consecutive(const std::int32_t* slots) {
#if defined(__AVX512F__)
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i expected = _mm512_add_epi32(_mm512_set1_epi32(slots[0]), steps);
    return slots[0] >= 0 && _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(slots), expected) == 0xffff;
#else
    for (int i = 1; i < lanes; ++i)
        if (slots[i] != slots[0] + i) return false;
    return slots[0] >= 0;
#endif
}

// Whether some of a block's 64 positions hold no token.
inline bool has_gaps(const std::int32_t* slots) {
    for (int i = 0; i < block_positions; i += lanes)
        if (!consecutive(slots + i))
            for (int j = i; j < i + lanes; ++j)
                if (slots[j] < 0) return true;
    return false;
}

// found[i] = rows + slots[i] * row_bytes, or `nothing` where no token is held.
inline void find_rows(const char* rows, std::int64_t row_bytes, const std::int32_t* slots, const char* nothing, const char** found) {
    for (int i = 0; i < block_positions; i += lanes) {
        if (consecutive(slots + i)) {
            const char* row = rows + slots[i] * row_bytes;
            unrolled<lanes>([&](auto j) KVLOOM_INLINE { found[i + j] = row + j * row_bytes; });
        } else {
            for (int j = i; j < i + lanes; ++j) found[j] = slots[j] < 0 ? nothing : rows + slots[j] * row_bytes;
        }
    }
}

}  // namespace kvloom
