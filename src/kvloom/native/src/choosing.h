// Which new tokens of a sequence must choose, and among what: `_choice_span` of attention/spans.py in C++.
#pragma once

#include <algorithm>
#include <vector>

#include "reader.h"

namespace kvloom {

// A source that may not read all that it holds. Its leading new tokens may, as long as what they read in any case, which
// grows with them, leaves room for all full blocks.
class Choosing {
public:
    Source source;                         // with the runs that are read in any case
    std::vector<Run> always;               // these, ascending
    std::vector<std::int32_t> candidates;  // the blocks that were full before the step, ascending by position
    std::int64_t unlimited = 0;            // how many leading new tokens read all

    Choosing(const Source& whole, const Run* runs, std::int64_t block_tokens)
        : source(whole), most_blocks_(whole.read_tokens / block_tokens) {
        for (const Run* run = runs; run < runs + whole.runs; ++run)
            if (run->count == block_tokens && run->first + run->count <= whole.first_position) candidates.push_back(run->block);
            else always.push_back(*run);
        source.runs = std::int64_t(always.size());
        while (unlimited < whole.count && take(unlimited) >= std::int64_t(candidates.size())) ++unlimited;
    }

    // How many of the candidates a new token takes.
    std::int64_t take(std::int64_t token) const {
        const std::int64_t end = source.first_position + token + 1;
        const auto seen = std::count_if(always.begin(), always.end(), [=](const Run& run) { return run.first < end; });
        return std::max<std::int64_t>(0, most_blocks_ - seen);
    }

private:
    std::int64_t most_blocks_;
};

}  // namespace kvloom
