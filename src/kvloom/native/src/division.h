// The work of a layer, divided among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"

namespace kvloom {

// Strides of one set and one key head: all of them, and the result goes to `out`; or those of one partition, and a record
// for each row goes to the partial results, from `first_partial` on.
struct Item {
    const Set* set;
    std::int64_t head;
    const Stride *begin, *end;
    bool whole;
    std::int64_t first_partial;
    std::int64_t cost;
};

// Partial results of a set and a head, in the order of partitions.
struct Split {
    const Set* set;
    std::int64_t head, partitions, first_partial;
};

// A block costs as much to read as some rows cost to multiply.
constexpr std::int64_t reading_rows = 6;

inline std::int64_t cost(const Stride* begin, const Stride* end, std::int64_t group) {
    std::int64_t rows = 0;
    for (; begin < end; ++begin) rows += (begin->end - begin->begin) * group + reading_rows;
    return rows;
}

inline const Stride* partition_end(const Stride* stride, const Stride* end) {
    const std::int32_t partition = stride->index / partition_blocks;
    while (stride < end && stride->index / partition_blocks == partition) ++stride;
    return stride;
}

class Division {
public:
    std::vector<Item> items;    // the largest first
    std::vector<Split> splits;
    std::int64_t partials = 0;  // floats

    Division(const Schedule& schedule, const Shape& shape, std::int64_t threads) {
        const Set *begin = schedule.sets, *end = begin + schedule.header->sets;
        std::vector<std::int64_t> costs;
        std::int64_t total = 0;
        for (const Set* set = begin; set < end; ++set) {
            const Stride* strides = schedule.strides + set->first_stride;
            costs.push_back(cost(strides, strides + set->strides, shape.group));
            total += costs.back() * shape.kv_heads;
        }
        const bool even = schedule.header->sets == 1 && shape.kv_heads % threads == 0;
        const std::int64_t share = even ? total : total / (4 * threads);
        for (const Set* set = begin; set < end; ++set)
            for (std::int64_t head = 0; head < shape.kv_heads; ++head)
                add(schedule, shape, set, head, costs[std::size_t(set - begin)], share);
        std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
    }

private:
    void add(const Schedule& schedule, const Shape& shape, const Set* set, std::int64_t head, std::int64_t own, std::int64_t share) {
        const Stride *begin = schedule.strides + set->first_stride, *end = begin + set->strides;
        if (own <= share || begin == end || partition_end(begin, end) == end) {
            items.push_back({set, head, begin, end, true, 0, own});
            return;
        }
        splits.push_back({set, head, 0, partials});
        for (const Stride* next; begin < end; begin = next, ++splits.back().partitions) {
            next = partition_end(begin, end);
            items.push_back({set, head, begin, next, false, partials, cost(begin, next, shape.group)});
            partials += set->tokens * shape.group * shape.record();
        }
    }
};

}  // namespace kvloom
