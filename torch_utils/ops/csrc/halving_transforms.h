// SPDX-License-Identifier: MIT
// The constant transforms of halving_conv.cpp, of kernels and of tiles of images, and their adjoints.
#pragma once

#include <algorithm>
#include <vector>

#include "halving_tiles.h"

namespace halving {

class Transforms {
  public:
    explicit Transforms(const Geometry& g) : g_(g), outside_(std::max(g.channels, g.out_channels)) {}

    // Kernels of an output channel and eight channels of a phase to a row of planes.
    void transform_lanes(const View<const float>& w, int64_t o, int64_t phase, int64_t channel,
                         const Planes& planes, int64_t column) const {
        V transformed[kPoints];
        transform_taps(transformed, w, o, phase, channel);
        for (int p = 0; p < kPoints; ++p) write(planes.at(p, o, column), transformed[p]);
    }

    // Kernels of eight output channels and eight channels of a phase to eight rows and columns of planes.
    void transform_square(const View<const float>& w, int64_t o, int64_t phase, int64_t channel,
                          const Planes& planes, int64_t column) const {
        V transformed[kLanes][kPoints];
        for (int l = 0; l < kLanes; ++l) transform_taps(transformed[l], w, o + l, phase, channel);
        const int64_t row = phase * g_.channels + channel;
        for (int p = 0; p < kPoints; ++p) {
            V square[kLanes];
            for (int l = 0; l < kLanes; ++l) square[l] = transformed[l][p];
            transpose(square);
            for (int l = 0; l < kLanes; ++l) write(planes.at(p, row + l, column), square[l]);
        }
    }

    // The adjoint: eight rows and columns of planes to kernels.
    void store_square(const Planes& planes, int64_t row, int64_t column, const View<float>& w, int64_t o,
                      int64_t phase, int64_t channel) const {
        V transformed[kLanes][kPoints];
        for (int p = 0; p < kPoints; ++p) {
            V square[kLanes];
            for (int l = 0; l < kLanes; ++l) square[l] = read<V>(planes.at(p, row + l, column));
            transpose(square);
            for (int l = 0; l < kLanes; ++l) transformed[l][p] = square[l];
        }
        for (int l = 0; l < kLanes; ++l) {
            V taps[kKernelTaps];
            sandwich<kKernelAdjoint, kTaps, kIn>(taps, transformed[l]);
            for (int t = 0; t < kKernelTaps; ++t) {
                float* to = tap_of(w, t, o + l, phase, channel);
                if (w.stride[1] == 1)
                    write(to, taps[t]);
                else
                    for (int c = 0; c < kLanes; ++c) to[c * w.stride[1]] = taps[t][c];
            }
        }
    }

    // Input tiles of a group to planes (tiles, inner).
    void transform_inputs(const View<const float>& x, int64_t group, const Planes& planes) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            for (int64_t phase = 0; phase < kPhases; ++phase) {
                const float* pixels[kPoints];
                std::fill_n(pixels, kPoints, outside_.data());
                g_.for_inputs(x, image, ty, tx, phase, [&](int at, auto pixel) { pixels[at] = pixel; });
                float* to = planes.at(0, tile, phase * g_.channels);
                for (int64_t c = 0; c < g_.channels; c += kLanes) {
                    V elements[kPoints], transformed[kPoints];
                    for (int p = 0; p < kPoints; ++p) elements[p] = read<V>(pixels[p] + c);
                    sandwich<kInput, kIn, kIn>(transformed, elements);
                    for (int p = 0; p < kPoints; ++p) write(to + p * planes.plane + c, transformed[p]);
                }
            }
        });
    }

    // The adjoint: adds planes (tiles, inner) to the pixels that they came from.
    void scatter_inputs(const Planes& planes, int64_t group, const View<float>& x) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            for (int64_t phase = 0; phase < kPhases; ++phase)
                scatter_tile(planes, tile, phase * g_.channels, g_.channels, x, image, ty, tx, phase);
        });
    }

    // Adds `columns` columns of a tile from `column` on to the first channels of x.
    void scatter_tile(const Planes& planes, int64_t tile, int64_t column, int64_t columns,
                      const View<float>& x, int64_t image, int64_t ty, int64_t tx, int64_t phase) const {
        float* pixels[kPoints] = {};
        g_.for_inputs(x, image, ty, tx, phase, [&](int at, auto pixel) { pixels[at] = pixel; });
        const float* from = planes.at(0, tile, column);
        for (int64_t c = 0; c < columns; c += kLanes) {
            V elements[kPoints], transformed[kPoints];
            for (int p = 0; p < kPoints; ++p) transformed[p] = read<V>(from + p * planes.plane + c);
            sandwich<kInputAdjoint, kIn, kIn>(elements, transformed);
            for (int p = 0; p < kPoints; ++p)
                if (pixels[p]) write(pixels[p] + c, read<V>(pixels[p] + c) + elements[p]);
        }
    }

    // Planes (tiles, columns) to the first channels of output tiles.
    void transform_outputs(const Planes& planes, int64_t columns, int64_t group, const float* bias,
                           const View<float>& y) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            float* pixels[kOutPixels] = {};
            g_.for_outputs(y, image, ty, tx, [&](int at, float* pixel) { pixels[at] = pixel; });
            const float* from = planes.at(0, tile);
            for (int64_t c = 0; c < columns; c += kLanes) {
                const V shift = bias ? read<V>(bias + c) : V{};
                V transformed[kPoints], elements[kOutPixels];
                for (int p = 0; p < kPoints; ++p) transformed[p] = read<V>(from + p * planes.plane + c);
                sandwich<kOutput, kOut, kIn>(elements, transformed);
                for (int p = 0; p < kOutPixels; ++p)
                    if (pixels[p]) write(pixels[p] + c, elements[p] + shift);
            }
        });
    }

    // The adjoint: output tiles to planes (tiles, out_channels).
    void gather_outputs(const View<const float>& y, int64_t group, const Planes& planes) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            const float* pixels[kOutPixels];
            std::fill_n(pixels, kOutPixels, outside_.data());
            g_.for_outputs(y, image, ty, tx, [&](int at, const float* pixel) { pixels[at] = pixel; });
            for (int64_t c = 0; c < g_.out_channels; c += kLanes) {
                float* to = planes.at(0, tile, c);
                V elements[kOutPixels], transformed[kPoints];
                for (int p = 0; p < kOutPixels; ++p) elements[p] = read<V>(pixels[p] + c);
                sandwich<kOutputAdjoint, kIn, kOut>(transformed, elements);
                for (int p = 0; p < kPoints; ++p) write(to + p * planes.plane, transformed[p]);
            }
        });
    }

  protected:
    const Geometry& g_;

  private:
    template <typename T>
    T* tap_of(const View<T>& w, int t, int64_t o, int64_t phase, int64_t channel) const {
        return w.data + o * w.stride[0] + channel * w.stride[1] +
               (t / kTaps * kStride + phase / kStride) * w.stride[2] +
               (t % kTaps * kStride + phase % kStride) * w.stride[3];
    }
    void transform_taps(V (&to)[kPoints], const View<const float>& w, int64_t o, int64_t phase,
                        int64_t channel) const {
        V taps[kKernelTaps];
        for (int t = 0; t < kKernelTaps; ++t) {
            const float* from = tap_of(w, t, o, phase, channel);
            if (w.stride[1] == 1)
                taps[t] = read<V>(from);
            else
                for (int c = 0; c < kLanes; ++c) taps[t][c] = from[c * w.stride[1]];
        }
        sandwich<kKernel, kIn, kTaps>(to, taps);
    }

    std::vector<float> outside_;  // a pixel beyond the border
};

}  // namespace halving
