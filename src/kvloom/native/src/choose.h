// Which blocks a key head reads for a token that may not read all that it holds (Tang et al. 2024, Quest, section 3): those
// whose bounds allow the largest scores. `_chosen` of attention/torch_ops.py in C++.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "softmax.h"
#include "small.h"

namespace kvloom {

// The queries of a group, each as what is positive of it and what is negative.
template <class E> class Group {
public:
    Group(const Layer& layer, std::int64_t row, std::int64_t head) : dim_(layer.shape.key_dim), padded_(rounded_up(dim_, lanes)) {
        const E* first = static_cast<const E*>(layer.queries) + row * layer.query_token_stride;
        parts_.resize(std::size_t(2 * layer.shape.group * padded_));
        float* to = parts_.data();
        for (std::int64_t query = 0; query < layer.shape.group; ++query, to += 2 * padded_) {
            const E* from = first + (head * layer.shape.group + query) * layer.query_head_stride;
            for_each_vector(dim_, [&](std::int64_t d, int count) {
                const f32x16 number = get(from + d, count);
                store(to + d, max(zeros(), number));
                store(to + padded_ + d, min(zeros(), number));
            });
        }
    }

    // The largest score that a query can have with a key within such bounds. What is no number counts as infinite.
    float most(const E* least, const E* largest) const {
        float most = -infinity;
        for (const float* query = parts_.data(); query < parts_.data() + parts_.size(); query += 2 * padded_) {
            f32x16 products = zeros();
            for_each_vector(dim_, [&](std::int64_t d, int count) {
                products = fma(load(query + d), get(largest + d, count), products);
                products = fma(load(query + padded_ + d), get(least + d, count), products);
            });
            const float own = sum(products);
            most = std::max(most, own == own ? own : infinity);
        }
        return most;
    }

private:
    const std::int64_t dim_, padded_;
    std::vector<float> parts_;  // [group, 2, padded]
};

// Writes the slots of the blocks that one key head chooses, ascending by position. Of equal ones the first are taken.
template <class E> void choose(const Layer& layer, const Choice& choice, std::int64_t head) {
    const Bounds& bounds = *layer.bounds;
    const std::int64_t dim = layer.shape.key_dim;
    const E* least = static_cast<const E*>(bounds.numbers) + head * bounds.blocks * dim;
    const E* largest = least + layer.shape.kv_heads * bounds.blocks * dim;
    const Group<E> group(layer, choice.row, head);
    const std::int32_t* candidates = layer.schedule.candidates + choice.first_candidate;
    std::vector<float> most;
    for (std::int32_t i = 0; i < choice.candidates; ++i)
        most.push_back(group.most(least + candidates[i] * dim, largest + candidates[i] * dim));
    std::vector<std::int32_t> order(most.size());
    std::iota(order.begin(), order.end(), 0);
    const auto better = [&](std::int32_t a, std::int32_t b) {
        const float one = most[std::size_t(a)], other = most[std::size_t(b)];
        return one != other ? one > other : a < b;
    };
    std::nth_element(order.begin(), order.begin() + choice.take, order.end(), better);
    std::sort(order.begin(), order.begin() + choice.take);
    std::int32_t* slots = layer.chosen_slots(head, choice.first_block);
    std::int32_t* end = slots + rounded_up(choice.take * bounds.block_tokens, block_positions);
    for (std::int32_t i = 0; i < choice.take; ++i, slots += bounds.block_tokens)
        std::iota(slots, slots + bounds.block_tokens, candidates[order[std::size_t(i)]] * std::int32_t(bounds.block_tokens));
    std::fill(slots, end, -1);
}

}  // namespace kvloom
