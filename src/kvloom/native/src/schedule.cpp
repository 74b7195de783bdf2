// From what sequences read to a schedule: which of it several new tokens read together.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "choosing.h"
#include "reader.h"
#include "simd.h"

namespace kvloom {
namespace {

// Readers that begin alike stand side by side, and among them those that go on alike.
std::vector<int> sorted(const std::vector<Reader>& readers) {
    std::vector<int> order(readers.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
        const Reader &a = readers[std::size_t(i)], &b = readers[std::size_t(j)];
        const std::size_t both = std::min(a.entries.size(), b.entries.size());
        for (std::size_t e = 0; e < both; ++e)
            if (const int difference = compare(a, a.entries[e], b, b.entries[e])) return difference < 0;
        return a.entries.size() < b.entries.size();
    });
    return order;
}

class Builder {
public:
    Builder(std::int64_t set_tokens, bool sealed, std::size_t most_blocks) : set_tokens_(set_tokens), sealed_(sealed) {
        slots_.reserve(most_blocks * block_positions);  // or half the time goes into making room
    }

    void add(Reader& reader, const Reader* previous) {
        enter_blocks(reader, previous);
        if (previous && compare(reader, reader.entries[0], *previous, previous->entries[0])) close_set();
        for (std::int64_t done = 0; done < reader.source().count;) {
            const std::int64_t count = std::min(reader.source().count - done, set_tokens_ - set_size());
            if (!count) { close_set(); continue; }
            enter_tokens(reader, done, count);
            done += count;
        }
    }

    // Each new token that must choose is a set of its own. `reader`: of what they read in any case.
    void add_choices(Reader& reader, const Choosing& choosing, std::int64_t block_tokens) {
        close_set();
        enter_blocks(reader, nullptr);
        const std::int32_t first = count(candidates_);
        candidates_.insert(candidates_.end(), choosing.candidates.begin(), choosing.candidates.end());
        for (std::int64_t token = choosing.unlimited; token < reader.source().count; ++token) {
            const std::int32_t take = std::int32_t(choosing.take(token));
            const std::int32_t blocks = std::int32_t((take * block_tokens + block_positions - 1) / block_positions);
            if (take) choices_.push_back({std::int32_t(reader.source().first_row + token), take, first, count(candidates_) - first, chosen_});
            enter_choice(reader, token, blocks);
            chosen_ += blocks;
        }
    }

    // Lays the parts out one behind the other; returns how many numbers they are, written or not.
    std::int64_t write(std::int32_t* out, std::int64_t capacity) {
        close_set();
        const Header header{count(sets_),  count(tokens_), count(strides_), count(slots_) / block_positions, widest_, sealed_,
                            count(turns_), count(shifts_), count(choices_), chosen_,                         count(candidates_)};
        const std::int64_t need = std::int64_t(sizeof(Header) + bytes(sets_) + bytes(tokens_) + bytes(strides_) + bytes(slots_) +
                                               bytes(turns_) + bytes(shifts_) + bytes(choices_) + bytes(candidates_)) / 4;
        if (need > capacity) return need;
        char* to = reinterpret_cast<char*>(out);
        std::memcpy(to, &header, sizeof header);
        to += sizeof header;
        to = put(to, sets_);
        to = put(to, tokens_);
        to = put(to, strides_);
        to = put(to, slots_);
        to = put(to, turns_);
        to = put(to, shifts_);
        to = put(to, choices_);
        put(to, candidates_);
        return need;
    }

private:
    // New tokens of one reader within the set that is being made: `low` to `last` is what they see in pass 0, `border` where
    // the window of the last one begins. `next` is the reader's entry that comes next.
    struct Part {
        const Reader* reader;
        std::int32_t begin, end;
        std::int64_t low, last, border, own;
        const Entry* next;

        bool reads(const Entry& entry) const {
            const std::int64_t first = entry.block() * block_positions;
            if (entry.native() && first + block_positions <= own) return false;
            return entry.pass() ? first < border : first <= last && first + block_positions > low;
        }
        const Entry* limit() const { return reader->entries.data() + reader->entries.size(); }
    };

    void enter_blocks(Reader& reader, const Reader* previous) {
        const Entry* other = previous ? previous->entries.data() : nullptr;
        const Entry* end = previous ? other + previous->entries.size() : nullptr;
        for (Entry& own : reader.entries) {
            while (other < end && other->key < own.key) ++other;
            if (other < end && !compare(reader, own, *previous, *other)) own.id = other->id;
            else {
                own.id = count(slots_) / block_positions;
                slots_.insert(slots_.end(), reader.slots(own), reader.slots(own) + block_positions);
            }
        }
    }

    void enter_tokens(const Reader& reader, std::int64_t done, std::int64_t number) {
        const std::int64_t first = reader.source().first_position + done, last = first + number - 1;
        const std::int32_t begin = std::int32_t(set_size());
        for (std::int64_t i = 0; i < number; ++i)
            tokens_.push_back({std::int32_t(reader.source().first_row + done + i), std::int32_t(reader.low(first + i)), std::int32_t(first + i),
                               reader.owns[std::size_t(done + i)], turns_of(reader, first + i)});
        parts_.push_back(part_of(reader, begin, done, number));
    }

    // `number` new tokens of a reader from the one numbered `done` on.
    static Part part_of(const Reader& reader, std::int32_t begin, std::int64_t done, std::int64_t number) {
        const std::int64_t first = reader.source().first_position + done, last = first + number - 1;
        return {&reader, begin, std::int32_t(begin + number), reader.low(first), last, reader.low(last),
                reader.owns[std::size_t(done)], reader.entries.data()};
    }

    // Positions count from behind the blocks of what is chosen, all of which is seen.
    void enter_choice(const Reader& reader, std::int64_t token, std::int32_t blocks) {
        const Part part = part_of(reader, 0, token, 1);
        const std::int32_t first_stride = count(strides_), before = blocks * block_positions;
        tokens_.push_back({std::int32_t(reader.source().first_row + token), 0, std::int32_t(part.last) + before,
                           sealed_ ? std::int32_t(part.own) + before : 0, -1});
        for (std::int32_t i = 0; i < blocks; ++i) strides_.push_back({i, ~(chosen_ + i), 0, 1, !sealed_, 0});
        for (const Entry& entry : reader.entries)
            if (part.reads(entry)) strides_.push_back({std::int32_t(entry.block()) + blocks, entry.id, 0, 1, entry.native(), 0});
        finish_set(first_stride);
    }

    // Where the turns of a token begin.
    std::int32_t turns_of(const Reader& reader, std::int64_t position) {
        if (!reader.source().turned || !reader.low(position)) return -1;
        const std::int32_t begin = count(turns_);
        for (std::int64_t stretch = 0; stretch < Reader::stretches_of(reader.source()); ++stretch) {
            const std::int32_t shift = std::int32_t(reader.shift(stretch, position));
            const auto found = shift_ids_.emplace(shift, count(shifts_));
            if (found.second) shifts_.push_back(shift);
            turns_.push_back(found.first->second);
        }
        return begin;
    }

    void close_set() {
        if (parts_.empty()) return;
        const std::int32_t first_stride = count(strides_);
        for (const Entry* entry; (entry = lowest());) enter_strides(*entry);
        finish_set(first_stride);
        parts_.clear();
    }

    void finish_set(std::int32_t first_stride) {
        sets_.push_back({first_token_, std::int32_t(set_size()), first_stride, count(strides_) - first_stride});
        widest_ = std::max(widest_, std::int32_t(set_size()));
        first_token_ = count(tokens_);
    }

    // Of the parts' next entries the one that comes first; null behind the last one.
    const Entry* lowest() const {
        const Entry* first = nullptr;
        for (const Part& part : parts_)
            if (part.next < part.limit() && (!first || part.next->key < first->key)) first = part.next;
        return first;
    }

    // One stride for each lot of neighbouring tokens that read the same block.
    void enter_strides(const Entry& entry) {
        bool open = false;
        for (Part& part : parts_) {
            const Entry* own = part.next < part.limit() && part.next->key == entry.key ? part.next++ : nullptr;
            const std::int32_t id = own && part.reads(*own) ? own->id : -1;
            if (open && id >= 0 && strides_.back().slots == id) strides_.back().end = part.end;
            else if (id >= 0) strides_.push_back({std::int32_t(entry.block()), id, part.begin, part.end, entry.native(), entry.pass()});
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

    const std::int64_t set_tokens_;
    const bool sealed_;
    std::vector<Set> sets_;
    std::vector<Token> tokens_;
    std::vector<Stride> strides_;
    std::vector<std::int32_t> slots_, turns_, shifts_, candidates_;
    std::vector<Choice> choices_;
    std::unordered_map<std::int32_t, std::int32_t> shift_ids_;
    std::vector<Part> parts_;
    std::int32_t first_token_ = 0, widest_ = 0, chosen_ = 0;
};

}  // namespace
}  // namespace kvloom

// Writes the schedule of `sources` into `out`, and returns how many numbers it has: if these are more than
// `capacity`, nothing was written. `runs` are those of all sources, one source behind the other, and so are
// `stretches`. `sealed`: whether full blocks are, and the three numbers of a source about its own blocks count.
KVLOOM_EXPORT std::int64_t kvloom_attention_schedule(
    const std::int32_t* runs, const std::int64_t* sources, const std::int64_t* stretches, std::int64_t count, std::int64_t window,
    std::int64_t chunk, std::int64_t block_tokens, std::int64_t set_tokens, std::int64_t sealed, std::int32_t* out, std::int64_t capacity) {
    using namespace kvloom;
    const Reach reach{window, chunk};
    const Run* next = reinterpret_cast<const Run*>(runs);
    const Stretch* next_stretch = reinterpret_cast<const Stretch*>(stretches);
    std::vector<Reader> readers;
    readers.reserve(std::size_t(count));
    std::vector<Choosing> choosing;
    std::size_t most_blocks = 0;
    const auto read = [&](const Source& source, const Run* own) {
        readers.emplace_back(source, own, next_stretch, reach, block_tokens, sealed);
        most_blocks += readers.back().entries.size();
    };
    for (const Source* source = reinterpret_cast<const Source*>(sources); count--; ++source) {
        Source reads_all = *source;
        if (source->read_tokens >= 0) {
            choosing.emplace_back(*source, next, block_tokens);
            reads_all.count = choosing.back().unlimited;
        }
        if (reads_all.count) read(reads_all, next);
        next += source->runs;
        next_stretch += source->stretches;
    }
    Builder builder(set_tokens, sealed, most_blocks);
    const Reader* previous = nullptr;
    for (const int i : sorted(readers)) {
        builder.add(readers[std::size_t(i)], previous);
        previous = &readers[std::size_t(i)];
    }
    for (const Choosing& own : choosing) {
        Reader reader(own.source, own.always.data(), nullptr, reach, block_tokens, sealed);
        builder.add_choices(reader, own, block_tokens);
    }
    return builder.write(out, capacity);
}
