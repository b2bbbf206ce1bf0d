// Deformable aggregation on the CPU; zoo/kernels/deformable.py says what it computes. Plain C symbols, no header of
// torch: the file compiles in seconds and does not depend on torch's version.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Index = std::int64_t;

struct BFloat16 {
  std::uint16_t bits;
};

// 64 bytes of channels that are computed together.
template <class Real>
struct Lanes {
  static constexpr int count = 64 / sizeof(Real);
  typedef Real Vector __attribute__((vector_size(64)));
};

typedef std::uint16_t Shorts __attribute__((vector_size(32)));
typedef std::uint32_t Words __attribute__((vector_size(64)));

template <class Stored, class Real>
Real widen(Stored x) {
  if constexpr (sizeof(Stored) == 2) {
    std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  } else {
    return x;
  }
}

template <class Stored, class Real>
Stored narrow(Real x) {
  if constexpr (sizeof(Stored) == 2) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {std::uint16_t((bits >> 16) | 0x40)};
    bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    return {std::uint16_t(bits >> 16)};
  } else {
    return x;
  }
}

template <class Stored, class Real>
inline typename Lanes<Real>::Vector load(const Stored* at, int width) {
  constexpr int lanes = Lanes<Real>::count;
  typename Lanes<Real>::Vector wide;
  if constexpr (sizeof(Stored) == 2) {
    Shorts bits = {};
    if (width == lanes) std::memcpy(&bits, at, sizeof bits);
    else std::memcpy(&bits, at, 2 * width);
    wide = (typename Lanes<Real>::Vector)(__builtin_convertvector(bits, Words) << 16);
  } else {
    wide = typename Lanes<Real>::Vector{};
    if (width == lanes) std::memcpy(&wide, at, sizeof wide);
    else std::memcpy(&wide, at, sizeof(Real) * width);
  }
  return wide;
}

template <class Real>
inline Real total(typename Lanes<Real>::Vector x) {
  typedef Real Half __attribute__((vector_size(32)));
  typedef Real Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  if constexpr (sizeof(Real) == 4) return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  else return quarter[0] + quarter[1];
}

template <class Real>
void add(Real* at, typename Lanes<Real>::Vector x, int width) {
  if (width == Lanes<Real>::count) {
    typename Lanes<Real>::Vector sum;
    std::memcpy(&sum, at, sizeof sum);
    sum += x;
    std::memcpy(at, &sum, sizeof sum);
  } else {
    for (int lane = 0; lane < width; ++lane) at[lane] += x[lane];
  }
}

// All sizes of one call. Strides count elements; the last axes of offsets and weights are dense.
struct Shape {
  Index batch, rows, columns, channels, points, groups, taps;
  Index offsets_image, offsets_point, offsets_group, weights_image, weights_point, weights_group;
};

// One axis of the samples of one point: the lower corner, its share and the share of the upper one. A corner outside
// the grid has a share of zero and stands at the nearest place inside it.
template <class Real>
struct Axis {
  std::vector<std::int32_t> low, high;
  std::vector<Real> low_share, high_share, low_inside, high_inside;

  explicit Axis(Index count)
      : low(count), high(count), low_share(count), high_share(count), low_inside(count), high_inside(count) {}

  void place(const Real* __restrict position, Index count, Index length) {
    const std::int32_t size = std::int32_t(length);
    const Real end = Real(size);
    std::int32_t *__restrict low = this->low.data(), *__restrict high = this->high.data();
    Real *__restrict low_share = this->low_share.data(), *__restrict high_share = this->high_share.data();
    Real *__restrict low_inside = this->low_inside.data(), *__restrict high_inside = this->high_inside.data();
    for (Index i = 0; i < count; ++i) {
      Real clear = position[i] > Real(-2) ? position[i] : Real(-2);
      clear = clear < end + 1 ? clear : end + 1;
      std::int32_t floor = std::int32_t(clear);
      floor -= Real(floor) > clear;
      const Real part = clear - Real(floor);
      const bool has_low = floor >= 0 && floor < size, has_high = floor >= -1 && floor + 1 < size;
      low[i] = has_low ? floor : 0;
      high[i] = has_high ? floor + 1 : size - 1;
      low_inside[i] = has_low ? Real(1) : Real(0);
      high_inside[i] = has_high ? Real(1) : Real(0);
      low_share[i] = has_low ? 1 - part : Real(0);
      high_share[i] = has_high ? part : Real(0);
    }
  }
};

template <class Stored, class Real, int AXES>
struct Samples {
  Axis<Real> y, x;
  std::vector<Real> position_y, position_x, weight, tap_y, tap_x;
  Index taps;

  Samples(const Shape& shape, const Real* at, Real scale)
      : y(shape.groups * shape.taps), x(shape.groups * shape.taps), taps(shape.taps) {
    const Index count = shape.groups * shape.taps;
    for (auto* each : {&position_y, &position_x, &weight, &tap_y, &tap_x}) each->resize(count);
    for (Index i = 0; i < count; ++i) {
      if (AXES == 2) tap_y[i] = scale * at[i % taps * 2];
      tap_x[i] = scale * at[i % taps * AXES + AXES - 1];
    }
  }

  // Whether a sample lies on the grid with one corner at least.
  bool meets(Index i) const {
    return (x.low_inside[i] != 0 || x.high_inside[i] != 0) &&
           (AXES == 1 || y.low_inside[i] != 0 || y.high_inside[i] != 0);
  }

  // Places the samples of the groups [from, to) of one point.
  void read(const Shape& shape, const Stored* offsets, const Stored* weights, const Real* base, Real scale, Index from,
            Index to) {
    for (Index group = from; group < to; ++group) {
      const Stored* offset = offsets + group * shape.offsets_group;
      const Stored* factor = weights + group * shape.weights_group;
      const Index start = (group - from) * taps;
      for (Index tap = 0; tap < taps; ++tap) {
        if (AXES == 2) position_y[start + tap] = widen<Stored, Real>(offset[2 * tap]);
        position_x[start + tap] = widen<Stored, Real>(offset[AXES * tap + AXES - 1]);
        weight[start + tap] = widen<Stored, Real>(factor[tap]);
      }
    }
    const Index count = (to - from) * taps;
    for (Index i = 0; i < count; ++i) {
      if (AXES == 2) position_y[i] = base[0] + tap_y[i] + scale * position_y[i];
      position_x[i] = base[AXES - 1] + tap_x[i] + scale * position_x[i];
    }
    if (AXES == 2) y.place(position_y.data(), count, shape.rows);
    x.place(position_x.data(), count, shape.columns);
  }
};

template <class Stored, class Real, int AXES>
void forward(const Shape& shape, const Stored* value, const Stored* offsets, const Stored* weights, const Real* base,
             const Real* taps, Real scale, int threads, Stored* out) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count;
  const Index width = shape.channels / shape.groups, image_size = shape.rows * shape.columns * shape.channels;
#pragma omp parallel num_threads(threads)
  {
    Samples<Stored, Real, AXES> samples(shape, taps, scale);
#pragma omp for schedule(static)
    for (Index row = 0; row < shape.batch * shape.points; ++row) {
      const Index image = row / shape.points, point = row % shape.points;
      samples.read(shape, offsets + image * shape.offsets_image + point * shape.offsets_point,
                   weights + image * shape.weights_image + point * shape.weights_point, base + point * AXES, scale, 0,
                   shape.groups);
      for (Index group = 0; group < shape.groups; ++group) {
        for (Index start = 0; start < width; start += lanes) {
          const int part = width - start < lanes ? int(width - start) : lanes;
          const Stored* from = value + image * image_size + group * width + start;
          Vector sum = {};
          auto taken = [&](int part) {
            for (Index i = group * shape.taps; i < (group + 1) * shape.taps; ++i) {
              if (!samples.meets(i)) continue;
              const Index left = samples.x.low[i] * shape.channels, right = samples.x.high[i] * shape.channels;
              const Real lower = samples.weight[i] * samples.x.low_share[i];
              const Real upper = samples.weight[i] * samples.x.high_share[i];
              if (AXES == 2) {
                const Stored* top = from + samples.y.low[i] * shape.columns * shape.channels;
                const Stored* bottom = from + samples.y.high[i] * shape.columns * shape.channels;
                sum += samples.y.low_share[i] *
                       (lower * load<Stored, Real>(top + left, part) + upper * load<Stored, Real>(top + right, part));
                sum += samples.y.high_share[i] * (lower * load<Stored, Real>(bottom + left, part) +
                                                  upper * load<Stored, Real>(bottom + right, part));
              } else {
                sum += lower * load<Stored, Real>(from + left, part) + upper * load<Stored, Real>(from + right, part);
              }
            }
          };
          if (part == lanes) taken(lanes);
          else taken(part);
          Stored* to = out + row * shape.channels + group * width + start;
          for (int lane = 0; lane < part; ++lane) to[lane] = narrow<Stored, Real>(sum[lane]);
        }
      }
    }
  }
}

// Each task owns the channels of one group of one image, so gradients are summed in one order whatever the threads.
template <class Stored, class Real, int AXES>
void backward(const Shape& shape, const Stored* gradient, const Stored* value, const Stored* offsets,
              const Stored* weights, const Real* base, const Real* taps, Real scale, int threads, Real* value_gradient,
              Stored* offsets_gradient, Stored* weights_gradient) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count;
  const Index width = shape.channels / shape.groups, image_size = shape.rows * shape.columns * shape.channels;
#pragma omp parallel num_threads(threads)
  {
    Samples<Stored, Real, AXES> samples(shape, taps, scale);
    const auto &x = samples.x, &y = samples.y;
#pragma omp for schedule(static)
    for (Index task = 0; task < shape.batch * shape.groups; ++task) {
      const Index image = task / shape.groups, group = task % shape.groups;
      const Stored* from = value + image * image_size + group * width;
      Real* into = value_gradient + image * image_size + group * width;
      for (Index point = 0; point < shape.points; ++point) {
        samples.read(shape, offsets + image * shape.offsets_image + point * shape.offsets_point,
                     weights + image * shape.weights_image + point * shape.weights_point, base + point * AXES, scale,
                     group, group + 1);
        const Index row = image * shape.points + point;
        const Stored* above = gradient + row * shape.channels + group * width;
        for (Index i = 0; i < shape.taps; ++i) {
          const Real weight = samples.weight[i];
          const Index left = x.low[i] * shape.channels, right = x.high[i] * shape.channels;
          const Index top = AXES == 2 ? y.low[i] * shape.columns * shape.channels : 0;
          const Index bottom = AXES == 2 ? y.high[i] * shape.columns * shape.channels : 0;
          const Real high = AXES == 2 ? y.low_share[i] : Real(1), low = AXES == 2 ? y.high_share[i] : Real(0);
          Vector by_weight = {}, by_y = {}, by_x = {};
          auto taken = [&](Index start, int part) {
            const Vector given = load<Stored, Real>(above + start, part);
            const Vector top_left = load<Stored, Real>(from + top + left + start, part);
            const Vector top_right = load<Stored, Real>(from + top + right + start, part);
            const Vector upper = x.low_share[i] * top_left + x.high_share[i] * top_right;
            const Vector upper_slope = x.high_inside[i] * top_right - x.low_inside[i] * top_left;
            const Vector share = weight * given;
            add<Real>(into + top + left + start, (high * x.low_share[i]) * share, part);
            add<Real>(into + top + right + start, (high * x.high_share[i]) * share, part);
            if (AXES == 2) {
              const Vector bottom_left = load<Stored, Real>(from + bottom + left + start, part);
              const Vector bottom_right = load<Stored, Real>(from + bottom + right + start, part);
              const Vector lower = x.low_share[i] * bottom_left + x.high_share[i] * bottom_right;
              const Vector lower_slope = x.high_inside[i] * bottom_right - x.low_inside[i] * bottom_left;
              by_weight += given * (high * upper + low * lower);
              by_y += given * (y.high_inside[i] * lower - y.low_inside[i] * upper);
              by_x += given * (high * upper_slope + low * lower_slope);
              add<Real>(into + bottom + left + start, (low * x.low_share[i]) * share, part);
              add<Real>(into + bottom + right + start, (low * x.high_share[i]) * share, part);
            } else {
              by_weight += given * upper;
              by_x += given * upper_slope;
            }
          };
          Index start = 0;
          for (; start + lanes <= width; start += lanes) taken(start, lanes);
          if (start < width) taken(start, int(width - start));
          const Index at = (row * shape.groups + group) * shape.taps + i;
          weights_gradient[at] = narrow<Stored, Real>(total<Real>(by_weight));
          if (AXES == 2) offsets_gradient[2 * at] = narrow<Stored, Real>(scale * weight * total<Real>(by_y));
          offsets_gradient[AXES * at + AXES - 1] = narrow<Stored, Real>(scale * weight * total<Real>(by_x));
        }
      }
    }
  }
}

}  // namespace

#define ZOO_DEFORMABLE(NAME, STORED, REAL)                                                                            \
  extern "C" void zoo_deformable_forward_##NAME(const std::int64_t* sizes, int axes, const void* value,                \
                                                const void* offsets, const void* weights, const void* base,           \
                                                const void* taps, double scale, int threads, void* out) {             \
    Shape shape;                                                                                                      \
    std::memcpy(&shape, sizes, sizeof shape);                                                                         \
    (axes == 1 ? forward<STORED, REAL, 1> : forward<STORED, REAL, 2>)(                                                \
        shape, (const STORED*)value, (const STORED*)offsets, (const STORED*)weights, (const REAL*)base,               \
        (const REAL*)taps, REAL(scale), threads, (STORED*)out);                                                       \
  }                                                                                                                   \
  extern "C" void zoo_deformable_backward_##NAME(                                                                      \
      const std::int64_t* sizes, int axes, const void* gradient, const void* value, const void* offsets,              \
      const void* weights, const void* base, const void* taps, double scale, int threads, void* value_gradient,       \
      void* offsets_gradient, void* weights_gradient) {                                                               \
    Shape shape;                                                                                                      \
    std::memcpy(&shape, sizes, sizeof shape);                                                                         \
    (axes == 1 ? backward<STORED, REAL, 1> : backward<STORED, REAL, 2>)(                                              \
        shape, (const STORED*)gradient, (const STORED*)value, (const STORED*)offsets, (const STORED*)weights,         \
        (const REAL*)base, (const REAL*)taps, REAL(scale), threads, (REAL*)value_gradient, (STORED*)offsets_gradient, \
        (STORED*)weights_gradient);                                                                                   \
  }

ZOO_DEFORMABLE(float32, float, float)
ZOO_DEFORMABLE(float64, double, double)
ZOO_DEFORMABLE(bfloat16, BFloat16, float)
