// SPDX-License-Identifier: MIT
// Rows of an image to the transformed tiles of Winograd's algorithm, and back.
//
// Eight neighbouring tiles of a row are worked on at once, one per lane. To have the same pixel of each in
// one vector, rows are taken apart into four phases, every fourth pixel; results are put together again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "axis.h"
#include "lanes.h"
#include "winograd_axes.h"

constexpr int64_t kTilesPerBlock = 384;  // columns of a matrix: few stay in the cache, many suit the BLAS

// From one of 36 matrices to the next: an odd number of cache lines, lest all compete for the same places.
inline int64_t step_of(int64_t rows, int64_t columns) { return (ceil_div(rows * columns, 16) | 1) * 16; }

// The tiles of a batch of images of size `height` x `width` after the convolution.
struct Tiles {
    int64_t height, width;
    int64_t rows = ceil_div(height, kTile), columns = ceil_div(width, kTile);
    int64_t lanes = ceil_div(columns, kLanes) * kLanes;

    int64_t rows_per_block() const {
        const int64_t wanted = std::max<int64_t>(kTilesPerBlock / columns, 1);
        return ceil_div(rows, ceil_div(rows, wanted));
    }
};

// From rows of images to V or D. kSize pixels make a tile, neighbours overlap by kSize - kTile.
template <typename T, int kSize> class Gatherer {
    using V = Lanes<T>;

  public:
    Gatherer(const Tiles& tiles, int64_t height, int64_t width, int64_t padding)
        : tiles_(tiles),
          height_(height),
          width_(width),
          padding_(padding),
          size_(tiles.lanes + kLanes),
          padded_(kTile * size_),
          lines_(kSize * kTile * size_),
          mixed_(kPatch * kTile * size_) {}

    // One channel, tile rows begin..end of its image. The result for tap k begins at to + k * step; the
    // `room` elements from there on are this channel's, and what follows the result may be overwritten.
    void run(const T* image, int64_t begin, int64_t end, T* to, int64_t step, int64_t room) {
        int64_t next = begin * kTile;
        for (int64_t row = begin; row < end; ++row) {
            for (; next < row * kTile + kSize; ++next) read_line(image, next - padding_, next % kSize);
            mix_rows(row);
            const int64_t place = (row - begin) * tiles_.columns;
            mix_columns(to + place, step, room - place);
        }
    }

  private:
    // Row y of the image, zero outside, into its place among the lines, phase by phase.
    void read_line(const T* image, int64_t y, int64_t place) {
        T* to = &lines_[place * kTile * size_];
        const int64_t begin = std::clamp<int64_t>(padding_, 0, kTile * size_),
                      end = std::clamp<int64_t>(padding_ + width_, begin, kTile * size_);
        if (y < 0 || y >= height_) {
            std::fill_n(to, kTile * size_, T(0));
            return;
        }
        std::copy_n(image + y * width_ + begin - padding_, end - begin, &padded_[begin]);
        for (int64_t i = 0; i < size_; i += kLanes) {
            const T* from = &padded_[kTile * i];
            const V a = read<V>(from), b = read<V>(from + 8), c = read<V>(from + 16), d = read<V>(from + 24);
            const V ab_even = SHUFFLE(a, b, 0, 4, 8, 12, 2, 6, 10, 14);
            const V ab_odd = SHUFFLE(a, b, 1, 5, 9, 13, 3, 7, 11, 15);
            const V cd_even = SHUFFLE(c, d, 0, 4, 8, 12, 2, 6, 10, 14);
            const V cd_odd = SHUFFLE(c, d, 1, 5, 9, 13, 3, 7, 11, 15);
            write(to + i, SHUFFLE(ab_even, cd_even, 0, 1, 2, 3, 8, 9, 10, 11));
            write(to + size_ + i, SHUFFLE(ab_odd, cd_odd, 0, 1, 2, 3, 8, 9, 10, 11));
            write(to + 2 * size_ + i, SHUFFLE(ab_even, cd_even, 4, 5, 6, 7, 12, 13, 14, 15));
            write(to + 3 * size_ + i, SHUFFLE(ab_odd, cd_odd, 4, 5, 6, 7, 12, 13, 14, 15));
        }
    }

    static void mix(const V (&from)[kSize], V (&to)[kPatch]) {
        if constexpr (kSize == kPatch) transform_input<T>(from, to);
        else transform_gradient<T>(from, to);
    }

    void mix_rows(int64_t row) {
        const T* lines[kSize];
        for (int k = 0; k < kSize; ++k) lines[k] = &lines_[(row * kTile + k) % kSize * kTile * size_];
        const int64_t count = kTile * size_;
        for (int64_t i = 0; i < count; i += kLanes) {
            V from[kSize], to[kPatch];
            for (int k = 0; k < kSize; ++k) from[k] = read<V>(lines[k] + i);
            mix(from, to);
            for (int k = 0; k < kPatch; ++k) write(&mixed_[k * count + i], to[k]);
        }
    }

    void mix_columns(T* to, int64_t step, int64_t room) {
        for (int y = 0; y < kPatch; ++y) {
            const T* line = &mixed_[y * kTile * size_];
            for (int64_t i = 0; i < tiles_.columns; i += kLanes) {
                V from[kSize], values[kPatch];
                for (int k = 0; k < kSize; ++k) from[k] = read<V>(line + k % kTile * size_ + i + k / kTile);
                mix(from, values);
                T* place = to + y * kPatch * step + i;
                if (i + kLanes <= room) {
                    for (int k = 0; k < kPatch; ++k) write(place + k * step, values[k]);
                } else {
                    for (int k = 0; k < kPatch; ++k)
                        std::memcpy(place + k * step, &values[k], (room - i) * sizeof(T));
                }
            }
        }
    }

    const Tiles& tiles_;
    const int64_t height_, width_, padding_, size_;
    std::vector<T> padded_, lines_, mixed_;  // a row; kSize rows in phases; six mixed rows in phases
};

// From M to rows of images.
template <typename T> class Scatterer {
    using V = Lanes<T>;

  public:
    explicit Scatterer(const Tiles& tiles) : tiles_(tiles), lines_(kTile * kTile * tiles.lanes) {}

    // One channel, tile rows begin..end of its image. Products of tap k begin at from + k * step.
    void run(const T* from, int64_t step, int64_t begin, int64_t end, T* image) {
        for (int64_t row = begin; row < end; ++row) {
            const T* products = from + (row - begin) * tiles_.columns;
            for (int64_t i = 0; i < tiles_.columns; i += kLanes) make_tiles(products + i, step, i);
            const int64_t count = std::min<int64_t>(kTile, tiles_.height - row * kTile);
            for (int64_t y = 0; y < count; ++y)
                std::copy_n(&lines_[y * kTile * tiles_.lanes], tiles_.width,
                            image + (row * kTile + y) * tiles_.width);
        }
    }

  private:
    void make_tiles(const T* from, int64_t step, int64_t i) {
        V mixed[kTile][kPatch];
        for (int x = 0; x < kPatch; ++x) {
            V products[kPatch], column[kTile];
            for (int y = 0; y < kPatch; ++y) products[y] = read<V>(from + (y * kPatch + x) * step);
            transform_output<T>(products, column);
            for (int y = 0; y < kTile; ++y) mixed[y][x] = column[y];
        }
        for (int y = 0; y < kTile; ++y) {
            V p[kTile];
            transform_output<T>(mixed[y], p);
            const V a = SHUFFLE(p[0], p[1], 0, 8, 1, 9, 4, 12, 5, 13);  // of tiles 0, 1, 4 and 5
            const V b = SHUFFLE(p[2], p[3], 0, 8, 1, 9, 4, 12, 5, 13);
            const V c = SHUFFLE(p[0], p[1], 2, 10, 3, 11, 6, 14, 7, 15);  // of tiles 2, 3, 6 and 7
            const V d = SHUFFLE(p[2], p[3], 2, 10, 3, 11, 6, 14, 7, 15);
            T* to = &lines_[kTile * (y * tiles_.lanes + i)];
            write(to, SHUFFLE(a, b, 0, 1, 8, 9, 2, 3, 10, 11));
            write(to + 8, SHUFFLE(c, d, 0, 1, 8, 9, 2, 3, 10, 11));
            write(to + 16, SHUFFLE(a, b, 4, 5, 12, 13, 6, 7, 14, 15));
            write(to + 24, SHUFFLE(c, d, 4, 5, 12, 13, 6, 7, 14, 15));
        }
    }

    const Tiles& tiles_;
    std::vector<T> lines_;  // four rows of an image
};
