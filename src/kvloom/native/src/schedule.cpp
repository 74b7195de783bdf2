// From tables to a schedule: which blocks of 64 positions each new token reads, and which tokens read the same ones.

#include "schedule.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "simd.h"

namespace kvloom {
namespace {

struct Run { std::int32_t block, offset, count, first; };  // as tables keep them
struct Source {
    std::int64_t runs, first_row, first_position, count;
    // Where blocks are sealed: the first position in the blocks that the step writes, and the native slots of that one
    // and of the first new token.
    std::int64_t first_own, own_slot, new_slot;
};

// What one sequence reads, from the block of the first position that its first new token sees. An index counts blocks, or
// where they are sealed their strides: codes have even ones, native slots odd ones.
struct Reader {
    Source source;
    std::vector<std::int32_t> owns;   // for each new token the first position of its own block
    std::int64_t first_index = 0;
    std::vector<std::int32_t> slots;  // 64 a block
    std::vector<std::int32_t> ids;    // for each block where its slots stand in the schedule; -1 if it holds no token

    std::int64_t end_index() const { return first_index + std::int64_t(ids.size()); }
    const std::int32_t* block(std::int64_t index) const { return slots.data() + (index - first_index) * block_positions; }
    std::int32_t id(std::int64_t index) const {
        return index < first_index || index >= end_index() ? -1 : ids[index - first_index];
    }
};

// The lowest position that a query sees.
struct Reach {
    std::int64_t window, chunk;  // 0 if there is none
    std::int64_t first_visible(std::int64_t position) const {
        if (window) return std::max<std::int64_t>(0, position - window + 1);
        return chunk ? position - position % chunk : 0;
    }
};

// Successive slots into the places `from` to `to`, whose blocks of 64 stand `apart` from each other.
void enter_slots(std::int32_t* blocks, std::int64_t apart, std::int64_t from, std::int64_t to, std::int64_t slot) {
    while (from < to) {
        const std::int64_t end = std::min(to, from - from % block_positions + block_positions);
        std::int32_t* place = blocks + from / block_positions * apart + from % block_positions;
        for (; from < end; ++from) *place++ = std::int32_t(slot++);
    }
}

Reader read(const Source& source, const Run* runs, const Reach& reach, std::int64_t block_tokens, int kinds) {
    Reader reader;
    reader.source = source;
    const std::int64_t last = source.first_position + source.count - 1;
    const std::int64_t first_block = reach.first_visible(source.first_position) / block_positions;
    const std::int64_t low = first_block * block_positions;
    reader.first_index = first_block * kinds;
    reader.owns.assign(source.count, 0);
    reader.ids.assign((last / block_positions + 1 - first_block) * kinds, -1);
    reader.slots.assign(reader.ids.size() * block_positions, -1);
    // Kind 0 is that of codes, or of all where nothing is sealed; kind 1 are native slots beside codes.
    const auto enter = [&](int kind, std::int64_t from, std::int64_t to, std::int64_t slot) {
        enter_slots(reader.slots.data() + kind * block_positions, kinds * block_positions, from - low, to - low, slot);
    };
    const Run* end = runs + source.runs;
    const Run* run = std::lower_bound(
        runs, end, low, [](const Run& r, std::int64_t position) { return r.first + r.count <= position; });
    for (; run < end && run->first <= last; ++run) {
        const std::int64_t from = std::max<std::int64_t>(low, run->first);
        const std::int64_t to = std::min<std::int64_t>(last + 1, run->first + run->count);
        const bool ended = kinds == 1 || run + 1 < end;
        if (ended) enter(0, from, to, run->block * block_tokens + run->offset + from - run->first);
        if (kinds == 1) continue;
        const std::int64_t own = std::max(from, source.first_own), fresh = std::max(own, source.first_position);
        enter(1, own, std::min(to, fresh), source.own_slot + own - source.first_own);
        enter(1, fresh, to, source.new_slot + fresh - source.first_position);
        for (std::int64_t position = fresh; position < to; ++position)
            reader.owns[position - source.first_position] = run->first;
    }
    return reader;
}

bool alike(const Reader& a, const Reader& b, std::int64_t index) {
    if (index < a.first_index || index >= a.end_index() || index < b.first_index || index >= b.end_index()) return false;
    return !std::memcmp(a.block(index), b.block(index), block_positions * sizeof(std::int32_t));
}

// Readers that begin alike stand side by side, and among them those that go on alike. In what order the bytes are compared
// does not matter.
std::vector<int> sorted(const std::vector<Reader>& readers) {
    std::vector<int> order(readers.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
        const Reader &a = readers[i], &b = readers[j];
        if (a.first_index != b.first_index) return a.first_index < b.first_index;
        const std::size_t both = std::min(a.slots.size(), b.slots.size());
        const int difference = std::memcmp(a.slots.data(), b.slots.data(), both * sizeof(std::int32_t));
        return difference ? difference < 0 : a.slots.size() < b.slots.size();
    });
    return order;
}

class Builder {
public:
    // `most_slots`: of all readers together.
    Builder(const Reach& reach, std::int64_t set_tokens, int kinds, std::size_t most_slots)
        : reach_(reach), set_tokens_(set_tokens), kinds_(kinds) {
        slots_.reserve(most_slots);  // or half the time goes into making room
    }

    void add(Reader& reader, const Reader* previous) {
        enter_blocks(reader, previous);
        if (previous && !alike(reader, *previous, reader.first_index)) close_set();
        for (std::int64_t done = 0; done < reader.source.count;) {
            const std::int64_t count = std::min(reader.source.count - done, set_tokens_ - set_size());
            if (!count) { close_set(); continue; }
            enter_tokens(reader, done, count);
            done += count;
        }
    }

    // Lays the parts out one behind the other; returns how many numbers they are, written or not.
    std::int64_t write(std::int32_t* out, std::int64_t capacity) {
        close_set();
        const Header header{count(sets_), count(tokens_), count(strides_), count(slots_) / block_positions, widest_, kinds_ == 2, {}};
        const std::int64_t need = std::int64_t(sizeof(Header) + bytes(sets_) + bytes(tokens_) + bytes(strides_) + bytes(slots_)) / 4;
        if (need > capacity) return need;
        char* to = reinterpret_cast<char*>(out);
        std::memcpy(to, &header, sizeof header);
        to += sizeof header;
        to = put(to, sets_);
        to = put(to, tokens_);
        to = put(to, strides_);
        put(to, slots_);
        return need;
    }

private:
    // New tokens of one reader within the set that is being made.
    struct Part { const Reader* reader; std::int32_t begin, end; std::int64_t first_index, end_index, first_own; };

    void enter_blocks(Reader& reader, const Reader* previous) {
        for (std::int64_t index = reader.first_index; index < reader.end_index(); ++index) {
            const std::int32_t* slots = reader.block(index);
            std::int32_t& id = reader.ids[index - reader.first_index];
            if (previous && alike(reader, *previous, index)) id = previous->id(index);
            else if (std::any_of(slots, slots + block_positions, [](std::int32_t slot) { return slot >= 0; })) {
                id = count(slots_) / block_positions;
                slots_.insert(slots_.end(), slots, slots + block_positions);
            }
        }
    }

    void enter_tokens(const Reader& reader, std::int64_t done, std::int64_t number) {
        const std::int64_t first = reader.source.first_position + done, last = first + number - 1;
        const std::int32_t begin = std::int32_t(set_size());
        for (std::int64_t i = 0; i < number; ++i)
            tokens_.push_back({std::int32_t(reader.source.first_row + done + i), std::int32_t(reach_.first_visible(first + i)),
                               std::int32_t(first + i), reader.owns[done + i]});
        parts_.push_back({&reader, begin, std::int32_t(begin + number), reach_.first_visible(first) / block_positions * kinds_,
                          (last / block_positions + 1) * kinds_, reader.owns[done] / block_positions});
    }

    void close_set() {
        if (parts_.empty()) return;
        const std::int32_t first_stride = count(strides_);
        std::int64_t index = parts_[0].first_index, end = 0;
        for (const Part& part : parts_) {
            index = std::min(index, part.first_index);
            end = std::max(end, part.end_index);
        }
        for (; index < end; ++index) enter_strides(index);
        sets_.push_back({first_token_, std::int32_t(set_size()), first_stride, count(strides_) - first_stride});
        widest_ = std::max(widest_, std::int32_t(set_size()));
        first_token_ = count(tokens_);
        parts_.clear();
    }

    // One stride for each lot of neighbouring tokens that read the same block.
    void enter_strides(std::int64_t index) {
        bool open = false;
        const std::int32_t block = std::int32_t(index / kinds_), native = kinds_ == 1 || index % 2;
        for (const Part& part : parts_) {
            const bool reads = index >= part.first_index && index < part.end_index && (!native || block >= part.first_own);
            const std::int32_t id = reads ? part.reader->id(index) : -1;
            if (open && id >= 0 && strides_.back().slots == id) strides_.back().end = part.end;
            else if (id >= 0) strides_.push_back({block, id, part.begin, part.end, native});
            open = id >= 0;
        }
    }

    std::int64_t set_size() const { return std::int64_t(tokens_.size()) - first_token_; }

    template <class T> static std::int32_t count(const std::vector<T>& part) { return std::int32_t(part.size()); }
    template <class T> static std::size_t bytes(const std::vector<T>& part) { return part.size() * sizeof(T); }
    template <class T> static char* put(char* to, const std::vector<T>& part) {
        if (!part.empty()) std::memcpy(to, part.data(), bytes(part));
        return to + bytes(part);
    }

    const Reach reach_;
    const std::int64_t set_tokens_;
    const int kinds_;  // of strides that a block of positions can have
    std::vector<Set> sets_;
    std::vector<Token> tokens_;
    std::vector<Stride> strides_;
    std::vector<std::int32_t> slots_;
    std::vector<Part> parts_;
    std::int32_t first_token_ = 0, widest_ = 0;
};

}  // namespace
}  // namespace kvloom

// Writes the schedule of `sources` into `out`, and returns how many numbers it has: if these are more than
// `capacity`, nothing was written. `runs` are those of all sources, one source behind the other. `sealed`: whether full
// blocks are, and the last three numbers of a source count.
KVLOOM_EXPORT std::int64_t kvloom_attention_schedule(
    const std::int32_t* runs, const std::int64_t* sources, std::int64_t count, std::int64_t window, std::int64_t chunk,
    std::int64_t block_tokens, std::int64_t set_tokens, std::int64_t sealed, std::int32_t* out, std::int64_t capacity) {
    using namespace kvloom;
    const Reach reach{window, chunk};
    const Run* next = reinterpret_cast<const Run*>(runs);
    const int kinds = sealed ? 2 : 1;
    std::vector<Reader> readers;
    readers.reserve(std::size_t(count));
    for (const Source* source = reinterpret_cast<const Source*>(sources); count--; ++source) {
        readers.push_back(read(*source, next, reach, block_tokens, kinds));
        next += source->runs;
    }
    std::size_t most_slots = 0;
    for (const Reader& reader : readers) most_slots += reader.slots.size();
    Builder builder(reach, set_tokens, kinds, most_slots);
    const Reader* previous = nullptr;
    for (const int i : sorted(readers)) {
        builder.add(readers[i], previous);
        previous = &readers[i];
    }
    return builder.write(out, capacity);
}
