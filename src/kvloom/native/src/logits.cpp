// What decoders ask of rows of logits: the normaliser of the log-softmax, the likeliest token, the best continuations.
//
// A row is cut into pieces of fixed size, which threads share; their results are merged in order. So the bits depend
// on the row alone.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "small.h"

using namespace kvloom;

namespace {

constexpr std::int64_t piece_columns = 8192;
constexpr std::int64_t min_shared = 1 << 16;  // numbers from which on threads share the work
constexpr float infinity = std::numeric_limits<float>::infinity();

template <class Element> f32x16 get_or_lowest(const Element* x, int count) {
    if (count == lanes) return load(x);
    float whole[lanes];
    std::fill(whole, whole + lanes, -infinity);
    for (int i = 0; i < count; ++i) whole[i] = to_float(x[i]);
    return load(whole);
}

// The largest of some numbers, and the sum of exp(x - largest), which is NaN if a number is NaN or plus infinity.
struct Piece {
    float largest, sum;
};

template <class Element> Piece summarize(const Element* x, std::int64_t columns) {
    f32x16 highs = all(-infinity);
    for_each_vector(columns, [&](std::int64_t i, int count) { highs = max(get_or_lowest(x + i, count), highs); });
    const float largest = highest(highs);
    // Minus infinity less minus infinity is no number; what is added is zero all the same.
    const f32x16 shift = all(largest == -infinity ? 0 : largest);
    f32x16 sums = zeros();
    for_each_vector(columns, [&](std::int64_t i, int count) { sums = sums + exp(get_or_lowest(x + i, count) - shift); });
    return {largest, sum(sums)};
}

struct Candidate {
    float score;
    std::int64_t index;
    bool operator<(const Candidate& other) const {  // whether it comes first
        return score > other.score || (score == other.score && index < other.index);
    }
};

// Into `best`, which is sorted and has `count` places.
void insert(std::vector<Candidate>& best, std::size_t count, const Candidate& candidate) {
    if (best.size() == count) best.pop_back();
    best.insert(std::upper_bound(best.begin(), best.end(), candidate), candidate);
}

// The best `count` of ((x - largest) - log_sum) + score, by value and then by index.
template <class Element>
void best_of_row(const Element* x, std::int64_t columns, float largest, float log_sum, float score, std::size_t count,
                 std::int64_t first_index, std::vector<Candidate>& best) {
    constexpr int vectors = 8;
    const auto scores = [&](std::int64_t i, int here) {
        return ((get_or_lowest(x + i, here) - all(largest)) - all(log_sum)) + all(score);
    };
    for (std::int64_t i = 0; i < columns; i += vectors * lanes) {
        const std::int64_t end = std::min<std::int64_t>(columns, i + vectors * lanes);
        if (best.size() == count) {
            f32x16 highs = all(-infinity);
            for (std::int64_t j = i; j < end; j += lanes)
                highs = max(scores(j, int(std::min<std::int64_t>(lanes, end - j))), highs);
            if (!(highest(highs) > best.back().score)) continue;
        }
        for (std::int64_t j = i; j < end; j += lanes) {
            const int here = int(std::min<std::int64_t>(lanes, end - j));
            float own[lanes];
            store(own, scores(j, here));
            for (int lane = 0; lane < here; ++lane)
                if (best.size() < count || own[lane] > best.back().score)
                    insert(best, count, {own[lane], first_index + j + lane});
        }
    }
}

}  // namespace

// For each row of logits[rows, columns] its largest number, that number's first index, and the log of the sum of
// exp(x - largest). Where a number is NaN or plus infinity, or all are minus infinity, the log is NaN, and the index
// means nothing.
KVLOOM_EXPORT void kvloom_normalizers(int dtype, const void* logits, std::int64_t row_stride, std::int64_t rows,
                                      std::int64_t columns, float* largest, std::int64_t* where, float* log_sums,
                                      int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        const Element* x = static_cast<const Element*>(logits);
        const std::int64_t count = (columns + piece_columns - 1) / piece_columns;
        std::vector<Piece> pieces(std::size_t(rows * count));
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns >= min_shared)
        for (std::int64_t i = 0; i < rows * count; ++i) {
            const std::int64_t first = i % count * piece_columns;
            pieces[std::size_t(i)] =
                summarize(x + i / count * row_stride + first, std::min(piece_columns, columns - first));
        }
        for (std::int64_t row = 0; row < rows; ++row) {
            const Piece* own = pieces.data() + row * count;
            const Piece* winner = std::max_element(
                own, own + count, [](const Piece& a, const Piece& b) { return a.largest < b.largest; });
            float total = 0;
            for (std::int64_t p = 0; p < count; ++p) total += own[p].sum * std::exp(own[p].largest - winner->largest);
            largest[row] = winner->largest;
            log_sums[row] = std::log(total);
            const Element* begin = x + row * row_stride + (winner - own) * piece_columns;
            const Element* end = std::min(begin + piece_columns, x + row * row_stride + columns);
            where[row] = std::min<std::int64_t>(
                columns - 1, std::find_if(begin, end, [&](Element e) { return to_float(e) == winner->largest; }) -
                                 (x + row * row_stride));
        }
    });
}

// The best `count` of all ((logits - largest) - log_sums) + scores, the best first, and of equal ones the first: their
// rows and columns, and the logarithms without the score. Where a row has no normaliser, all are NaN.
KVLOOM_EXPORT void kvloom_best(int dtype, const void* logits, std::int64_t row_stride, std::int64_t rows,
                               std::int64_t columns, const float* largest, const float* log_sums, const float* scores,
                               std::int64_t count, float* best_scores, float* best_logs, std::int64_t* best_rows,
                               std::int64_t* best_columns, int threads) {
    std::vector<std::vector<Candidate>> best(static_cast<std::size_t>(rows));
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns >= min_shared)
        for (std::int64_t row = 0; row < rows; ++row)
            best_of_row(static_cast<const Element*>(logits) + row * row_stride, columns, largest[row], log_sums[row],
                        scores[row], std::size_t(count), row * columns, best[std::size_t(row)]);
    });
    constexpr float none = std::numeric_limits<float>::quiet_NaN();
    std::vector<Candidate> merged;
    bool numbers = true;
    for (std::int64_t row = 0; row < rows; ++row) {
        numbers = numbers && log_sums[row] == log_sums[row];
        merged.insert(merged.end(), best[std::size_t(row)].begin(), best[std::size_t(row)].end());
    }
    if (numbers) std::partial_sort(merged.begin(), merged.begin() + count, merged.end());
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t index = numbers ? merged[std::size_t(i)].index : 0;
            const std::int64_t row = best_rows[i] = index / columns, column = best_columns[i] = index % columns;
            const float x = to_float(static_cast<const Element*>(logits)[row * row_stride + column]);
            best_scores[i] = numbers ? merged[std::size_t(i)].score : none;
            best_logs[i] = numbers ? (x - largest[row]) - log_sums[row] : none;
        }
    });
}
