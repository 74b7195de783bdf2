// Sampling: what temperature, top-k and top-p leave of a row of logits, and which token of that a uniform number draws.
//
// Hundreds of thousands of tokens are never sorted. They are counted by how much less likely they are than the
// likeliest, and only those that stand where a limit falls are put in order. A row is the work of one thread and is
// gone through in one order, so what it draws depends on the row alone.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "small.h"

using namespace kvloom;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
// Tokens of bin b are between e^(-b / 64) and e^(-(b + 1) / 64) times as likely as the likeliest; the last bin takes the
// rest.
constexpr int bins = 2048;
constexpr float bins_per_unit = 64;

int bin_of(float score, float largest) { return int(std::min((largest - score) * bins_per_unit, float(bins - 1))); }

// The tokens that are still in the running, in the order of the vocabulary. Scores and weights go on, with -infinity and
// zeros, to a whole number of vectors.
struct Tokens {
    std::vector<float> scores, weights;  // logit / temperature, and exp(score - largest)
    std::vector<std::int64_t> ids;       // empty: all tokens, by their index
    std::int64_t count = 0, padded = 0;
    float largest = 0;

    void resize(std::int64_t tokens) {
        count = tokens;
        padded = (tokens + lanes - 1) / lanes * lanes;
        if (std::int64_t(scores.size()) < padded) {
            scores.resize(std::size_t(padded));
            weights.resize(std::size_t(padded));
        }
        std::fill(scores.begin() + count, scores.begin() + padded, -infinity);
        std::fill(weights.begin() + count, weights.begin() + padded, 0.0f);
    }
    std::int64_t id(std::int64_t place) const { return ids.empty() ? place : ids[std::size_t(place)]; }
};

// Calls `function` with the place of each vector.
template <class Function> void for_each_group(const Tokens& tokens, Function function) {
    for (std::int64_t i = 0; i < tokens.padded; i += lanes) function(i);
}

template <class Element>
void read_scores(const Element* logits, std::int64_t columns, float temperature, Tokens& tokens) {
    tokens.resize(columns);
    tokens.ids.clear();
    f32x16 highs = all(-infinity);
    for_each_vector(columns, [&](std::int64_t i, int count) {
        const f32x16 scores = get(logits + i, count) / all(temperature);
        put(tokens.scores.data() + i, scores, count);
        highs = max(load(tokens.scores.data() + i), highs);
    });
    tokens.largest = highest(highs);
}

// Returns false where there is no distribution: a score is NaN or plus infinity, or all are minus infinity.
bool weigh(Tokens& tokens) {
    f32x16 sums = zeros();
    for_each_group(tokens, [&](std::int64_t i) {
        const f32x16 weights = exp(load(tokens.scores.data() + i) - all(tokens.largest));
        store(tokens.weights.data() + i, weights);
        sums = sums + weights;
    });
    const float total = sum(sums);
    return total > 0 && total < infinity;
}

// Places of the tokens of one bin. Vectors that lie wholly below it are passed over.
template <class Function> void in_bin(const Tokens& tokens, int bin, Function function) {
    const float below = bin == bins - 1 ? -infinity : tokens.largest - float(bin + 2) / bins_per_unit;
    const float* scores = tokens.scores.data();
    for_each_group(tokens, [&](std::int64_t i) {
        if (highest(load(scores + i)) < below) return;
        for (std::int64_t j = i; j < std::min(i + lanes, tokens.count); ++j)
            if (bin_of(scores[j], tokens.largest) == bin) function(j);
    });
}

// The k-th largest score.
float kth_score(const Tokens& tokens, std::int64_t k) {
    const float* scores = tokens.scores.data();
    std::int64_t counts[bins] = {};
    for (std::int64_t i = 0; i < tokens.count; ++i) ++counts[bin_of(scores[i], tokens.largest)];
    int bin = 0;
    for (; counts[bin] < k; ++bin) k -= counts[bin];
    std::vector<float> there;
    in_bin(tokens, bin, [&](std::int64_t place) { there.push_back(scores[place]); });
    std::nth_element(there.begin(), there.begin() + (k - 1), there.end(), std::greater<float>());
    return there[std::size_t(k - 1)];
}

// Leaves the k likeliest tokens, and all that are as likely as the last of them.
void keep_top_k(Tokens& tokens, std::int64_t k) {
    const float limit = kth_score(tokens, k);
    float *scores = tokens.scores.data(), *weights = tokens.weights.data();
    std::int64_t kept = 0;
    for_each_group(tokens, [&](std::int64_t i) {
        if (highest(load(scores + i)) < limit) return;
        for (std::int64_t j = i; j < std::min(i + lanes, tokens.count); ++j)
            if (scores[j] >= limit) {
                scores[kept] = scores[j];
                weights[kept++] = weights[j];
                tokens.ids.push_back(j);
            }
    });
    tokens.resize(kept);
}

// Takes away, from the least likely on, as many tokens as have no more than 1 - p of the probability together. Of equally
// likely ones the first go first; the last of all stays.
void keep_top_p(Tokens& tokens, double p) {
    const float* scores = tokens.scores.data();
    float* weights = tokens.weights.data();
    double masses[bins] = {}, total = 0;
    for (std::int64_t i = 0; i < tokens.count; ++i) masses[bin_of(scores[i], tokens.largest)] += double(weights[i]);
    for (int bin = bins - 1; bin >= 0; --bin) total += masses[bin];
    const double most = (1 - p) * total;
    double gone = 0;
    int bin = bins - 1;
    for (; bin > 0 && gone + masses[bin] <= most; --bin) gone += masses[bin];
    std::vector<std::int64_t> there;
    in_bin(tokens, bin, [&](std::int64_t place) { there.push_back(place); });
    std::stable_sort(there.begin(), there.end(), [&](std::int64_t a, std::int64_t b) { return scores[a] < scores[b]; });
    auto first = there.begin();
    for (; first + 1 < there.end() && gone + double(weights[*first]) <= most; ++first) {
        gone += double(weights[*first]);
        weights[*first] = 0;
    }
    const f32x16 limit = all(scores[*first]);
    for_each_group(tokens, [&](std::int64_t i) {
        store(weights + i, where_not_less(load(scores + i), limit, load(weights + i)));
    });
}

// The first token up to which the weights add up to more than `uniform` of their total.
std::int64_t draw(const Tokens& tokens, double uniform) {
    const float* weights = tokens.weights.data();
    double total = 0;
    for_each_group(tokens, [&](std::int64_t i) { total += double(sum(load(weights + i))); });
    const double wanted = uniform * total;
    double before = 0;
    std::int64_t group = 0;
    for (; group + lanes < tokens.padded; group += lanes) {
        const double own = double(sum(load(weights + group)));
        if (before + own > wanted) break;
        before += own;
    }
    // A vector is added up in another order than one by one, so rounding may leave none: then it is the last possible one.
    std::int64_t drawn = -1;
    for (std::int64_t i = group; i < group + lanes; ++i)
        if (weights[i] > 0) {
            drawn = tokens.id(i);
            before += double(weights[i]);
            if (before > wanted) break;
        }
    return drawn;
}

}  // namespace

// For each row of logits[rows, columns] the token that uniforms[row] draws, or -1 where none is possible.
//
// `top_k` of 0 and `top_p` of 1 keep all. With a row stride of 0 one row of logits serves all.
KVLOOM_EXPORT void kvloom_draw(int dtype, const void* logits, std::int64_t row_stride, std::int64_t rows,
                               std::int64_t columns, float temperature, std::int64_t top_k, double top_p,
                               const double* uniforms, std::int64_t* drawn, int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(threads) if (rows > 1)
        {
            Tokens tokens;
            std::int64_t left = -1;  // the row of logits whose tokens are left, if there are any
            bool possible = false;
#pragma omp for schedule(static)
            for (std::int64_t row = 0; row < rows; ++row) {
                if (row_stride || left < 0) {
                    read_scores(static_cast<const Element*>(logits) + row * row_stride, columns, temperature, tokens);
                    possible = weigh(tokens);
                    if (possible && top_k && top_k < columns) keep_top_k(tokens, top_k);
                    if (possible && top_p < 1) keep_top_p(tokens, top_p);
                    left = row;
                }
                drawn[row] = possible ? draw(tokens, uniforms[row]) : -1;
            }
        }
    });
}
