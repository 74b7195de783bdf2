// What the sequences of a step read: from their tables, and from what policies let be seen, to blocks of 64 positions.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "schedule.h"

namespace kvloom {

struct Source {
    std::int64_t runs, first_row, first_position, count;
    // Where blocks are sealed: the first position in the blocks that the step writes, and the native slots of that one
    // and of the first new token.
    std::int64_t first_own, own_slot, new_slot;
    // What a policy lets its tokens see, as cache/retention/sight.py has it: a window, 0 if they see all; the first
    // position whose token does not see all; stretches that are seen from everywhere; whether these are seen at other
    // distances, and which distance is never reached then, 0 if any may be.
    std::int64_t window, exact, stretches, turned, trained;
    // The most tokens that each of them may read, in whole blocks of its choice; negative if it reads all that it sees.
    std::int64_t read_tokens;
};
struct Stretch {
    std::int64_t first, end;
    std::int64_t before(std::int64_t position) const { return std::max<std::int64_t>(0, std::min(end, position) - first); }
};

// The lowest position that a query sees.
struct Reach {
    std::int64_t window, chunk;  // 0 if there is none
    std::int64_t first_visible(std::int64_t position) const {
        if (window) return std::max<std::int64_t>(0, position - window + 1);
        return chunk ? position - position % chunk : 0;
    }
};

// 64 positions as they are read in one pass. Entries ascend by block, then by pass, codes before native slots.
struct Entry {
    std::int64_t key, place;  // where its slots begin among the reader's
    std::int32_t id;          // where they stand in the schedule

    static std::int64_t key_of(std::int64_t block, std::int64_t pass, bool native) { return block << 32 | pass << 1 | std::int64_t(native); }
    std::int64_t block() const { return key >> 32; }
    std::int32_t pass() const { return std::int32_t(key & 0xffffffff) >> 1; }
    bool native() const { return key & 1; }
};

// What one sequence reads: blocks that hold something that its new tokens see.
class Reader {
public:
    std::vector<Entry> entries;
    std::vector<std::int32_t> owns;  // for each new token the first position of its own block

    Reader(const Source& source, const Run* runs, const Stretch* stretches, const Reach& reach, std::int64_t block_tokens, bool sealed)
        : source_(source), runs_(runs), stretches_(stretches), reach_(reach), block_tokens_(block_tokens), sealed_(sealed) {
        const std::int64_t last = source.first_position + source.count - 1, border = low(last);
        owns.assign(std::size_t(source.count), 0);
        reserve(last);
        enter(0, low(source.first_position) / block_positions * block_positions, last + 1);
        for (std::int64_t i = 0; i < stretches_of(source); ++i) {
            if (source.turned || !i) pass_begin_ = entries.size();
            enter(source.turned ? i + 1 : 1, stretches[i].first, std::min(stretches[i].end, border));
        }
        const auto by_key = [](const Entry& a, const Entry& b) { return a.key < b.key; };
        if (!std::is_sorted(entries.begin(), entries.end(), by_key)) std::sort(entries.begin(), entries.end(), by_key);
    }

    static std::int64_t stretches_of(const Source& source) { return source.window ? source.stretches : 0; }

    const Source& source() const { return source_; }
    const std::int32_t* slots(const Entry& entry) const { return slots_.data() + entry.place; }

    // The lowest position that a token sees in pass 0.
    std::int64_t low(std::int64_t position) const {
        if (!source_.window) return reach_.first_visible(position);
        return position < source_.exact ? 0 : std::max<std::int64_t>(0, position - source_.window + 1);
    }

    // How far a query is turned back for what it sees of a stretch before its window.
    std::int64_t shift(std::int64_t stretch, std::int64_t position) const {
        const std::int64_t border = low(position);
        std::int64_t hidden = std::max<std::int64_t>(0, border - stretches_[stretch].end);
        for (std::int64_t later = stretch + 1; later < source_.stretches; ++later) hidden -= stretches_[later].before(border);
        const std::int64_t too_far = source_.trained ? position - stretches_[stretch].first - (source_.trained - 1) : 0;
        return std::max<std::int64_t>({0, hidden, too_far});
    }

private:
    void reserve(std::int64_t last) {
        const std::int64_t blocks = (last - low(source_.first_position)) / block_positions + 2;
        const std::int64_t runs = source_.runs * (1 + (block_tokens_ + block_positions - 1) / block_positions);
        const std::size_t most = std::size_t(std::min(blocks, runs) * (sealed_ ? 2 : 1));
        entries.reserve(most);
        slots_.reserve(most * block_positions);
    }

    // What the table holds of positions, as a pass reads it.
    void enter(std::int64_t pass, std::int64_t low, std::int64_t limit) {
        const Run* end = runs_ + source_.runs;
        const Run* run = std::lower_bound(
            runs_, end, low, [](const Run& r, std::int64_t position) { return r.first + r.count <= position; });
        for (; run < end && run->first < limit; ++run) {
            const std::int64_t from = std::max<std::int64_t>(low, run->first), to = std::min<std::int64_t>(limit, run->first + run->count);
            const std::int64_t slot = run->block * block_tokens_ + run->offset + from - run->first;
            if (!sealed_) {
                enter_slots(pass, true, from, to, slot);
                continue;
            }
            if (run + 1 < end) enter_slots(pass, false, from, to, slot);
            const std::int64_t own = std::max(from, source_.first_own), fresh = std::max(own, source_.first_position);
            enter_slots(pass, true, own, std::min(to, fresh), source_.own_slot + own - source_.first_own);
            enter_slots(pass, true, fresh, to, source_.new_slot + fresh - source_.first_position);
            if (!pass)
                for (std::int64_t position = fresh; position < to; ++position) owns[std::size_t(position - source_.first_position)] = run->first;
        }
    }

    // Successive slots for the positions `from` to `to`.
    void enter_slots(std::int64_t pass, bool native, std::int64_t from, std::int64_t to, std::int64_t slot) {
        while (from < to) {
            const std::int64_t block = from / block_positions, end = std::min(to, (block + 1) * block_positions);
            std::int32_t* place = slots_of(Entry::key_of(block, pass, native)) + from % block_positions;
            for (; from < end; ++from) *place++ = std::int32_t(slot++);
        }
    }

    // Those of an entry, a new one if there is none yet. Blocks of a pass come in ascending order, codes and native ones apart,
    // so native ones of a run may stand between the codes of two runs.
    std::int32_t* slots_of(std::int64_t key) {
        const std::int64_t between = sealed_ ? block_tokens_ / block_positions + 1 : 0;
        for (std::size_t i = entries.size(); i-- > pass_begin_ && entries[i].block() + between >= key >> 32;)
            if (entries[i].key == key) return slots_.data() + entries[i].place;
        entries.push_back({key, std::int64_t(slots_.size()), -1});
        slots_.resize(slots_.size() + block_positions, -1);
        return slots_.data() + entries.back().place;
    }

    const Source source_;
    const Run* runs_;
    const Stretch* stretches_;
    const Reach reach_;
    const std::int64_t block_tokens_;
    const bool sealed_;
    std::vector<std::int32_t> slots_;  // 64 an entry; -1 where no token is held, or none that is seen
    std::size_t pass_begin_ = 0;       // the first entry of the pass that is being entered
};

// Negative, zero or positive. In what order slots are compared does not matter.
inline int compare(const Reader& a, const Entry& x, const Reader& b, const Entry& y) {
    if (x.key != y.key) return x.key < y.key ? -1 : 1;
    return std::memcmp(a.slots(x), b.slots(y), block_positions * sizeof(std::int32_t));
}

}  // namespace kvloom
