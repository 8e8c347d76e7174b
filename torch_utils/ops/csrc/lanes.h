// SPDX-License-Identifier: MIT
// A pixel of eight feature maps as one vector, and the way there from ordinary image tensors.
//
// With one map per lane, filtering along rows and along columns are the same aligned operations on whole
// vectors, whatever the width of an image.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

constexpr int kLanes = 8;

template <typename T> struct LanesOf {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T> using Lanes = typename LanesOf<T>::type;

// Element i of the result is element indices[i] of a and b, seen as one array.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

// rows[i][j] becomes rows[j][i].
template <typename V> inline void transpose(V (&rows)[kLanes]) {
    V pairs[kLanes], quads[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
        pairs[i] = SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < kLanes; i += 4) {
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = SHUFFLE(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            quads[i + 2 * j + 1] = SHUFFLE(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = SHUFFLE(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[i + 4] = SHUFFLE(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Whether each lane's comparison came out true, one bit per lane.
template <typename M> inline int bits_of(M comparison) {
#ifdef __AVX__
    if constexpr (sizeof(M) == 32) return __builtin_ia32_movmskps256((Lanes<float>)comparison);
#endif
    int bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (comparison[lane] != 0) << lane;
    return bits;
}

// True in the lanes whose bit is set.
template <typename V> inline auto lanes_of(int bits) {
    using M = decltype(V{} < V{});
    using Int = std::decay_t<decltype(M{}[0])>;
    constexpr M bit_of_lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return ((M{} + Int(bits)) & bit_of_lane) != 0;
}

// Eight elements that lie one after the other, at any address.
template <typename V, typename S> inline V read(const S* from) {
    using T = std::decay_t<decltype(V{}[0])>;
    V v;
    if constexpr (std::is_same_v<S, T>) {
        std::memcpy(&v, from, sizeof(V));
    } else {
        for (int i = 0; i < kLanes; ++i) v[i] = T(from[i]);
    }
    return v;
}

template <typename V, typename S> inline void write(S* to, V v) {
    using T = std::decay_t<decltype(V{}[0])>;
    if constexpr (std::is_same_v<S, T>) {
        std::memcpy(to, &v, sizeof(V));
    } else {
        for (int i = 0; i < kLanes; ++i) to[i] = S(v[i]);
    }
}

// Where the feature maps of one tensor lie in memory, in elements.
struct Layout {
    int64_t image, channel, row, column;
};

// `count` pixels of up to eight maps, `channel_step` apart, as vectors, plus `bias`. Lanes beyond `num_maps`
// repeat the first map.
template <typename S, typename V>
inline void load_pixels(V* to, const S* from, int64_t channel_step, int64_t column_step, int num_maps,
                        int64_t count, V bias) {
    using T = std::decay_t<decltype(V{}[0])>;
    if (channel_step == 1 && num_maps == kLanes) {  // channels last: they are vectors already
        for (int64_t i = 0; i < count; ++i) to[i] = read<V>(from + i * column_step) + bias;
        return;
    }
    const S* maps[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) maps[lane] = from + (lane < num_maps ? lane : 0) * channel_step;
    if (column_step != 1 || count < kLanes) {
        for (int64_t i = 0; i < count; ++i) {
            V pixel;
            for (int lane = 0; lane < kLanes; ++lane) pixel[lane] = T(maps[lane][i * column_step]);
            to[i] = pixel + bias;
        }
        return;
    }
    for (int64_t next = 0; next < count; next += kLanes) {
        const int64_t i = next + kLanes <= count ? next : count - kLanes;  // the last ones overlap
        V block[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) block[lane] = read<V>(maps[lane] + i);
        transpose(block);
        for (int j = 0; j < kLanes; ++j) to[i + j] = block[j] + bias;
    }
}

// The inverse of `load_pixels`.
template <typename S, typename V>
inline void store_pixels(S* to, const V* from, int64_t channel_step, int64_t column_step, int num_maps,
                         int64_t count) {
    if (channel_step == 1 && num_maps == kLanes) {
        for (int64_t i = 0; i < count; ++i) write(to + i * column_step, from[i]);
        return;
    }
    if (column_step != 1 || count < kLanes) {
        for (int64_t i = 0; i < count; ++i)
            for (int lane = 0; lane < num_maps; ++lane)
                to[lane * channel_step + i * column_step] = S(from[i][lane]);
        return;
    }
    for (int64_t next = 0; next < count; next += kLanes) {
        const int64_t i = next + kLanes <= count ? next : count - kLanes;
        V block[kLanes];
        for (int j = 0; j < kLanes; ++j) block[j] = from[i + j];
        transpose(block);
        for (int lane = 0; lane < num_maps; ++lane) write(to + lane * channel_step + i, block[lane]);
    }
}

// Memory that one thread keeps from call to call: fresh pages would cost more than the arithmetic.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    // At least `bytes`, with undefined contents; valid until the next call.
    char* reserve(size_t bytes) {
        if (bytes > capacity_) {
            std::free(memory_);
            capacity_ = 0;
            memory_ = nullptr;
            bytes = (bytes + 63) / 64 * 64;
            if (posix_memalign(&memory_, 64, bytes) != 0) throw std::bad_alloc();
            capacity_ = bytes;
        }
        return static_cast<char*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t capacity_ = 0;
};
