// Deformable aggregation on the CPU; zoo/kernels/deformable.py says what it computes. Plain C symbols, no header of
// torch: the file compiles in seconds and does not depend on torch's version.

#include <algorithm>
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

// See Samples. A function by itself, not to be inlined: there compilers see that nothing overlaps, and make vector code.
template <class Real>
__attribute__((noinline)) void settle(const std::int32_t* __restrict size, const Real* __restrict position,
                                      std::int32_t* __restrict low, std::int32_t* __restrict high,
                                      Real* __restrict low_share, Real* __restrict high_share,
                                      Real* __restrict low_inside, Real* __restrict high_inside, Index count) {
  // In one loop compilers would see branches; these three they turn into vector code.
  for (Index i = 0; i < count; ++i) {
    const Real end = Real(size[i] + 1);
    const Real above = position[i] > Real(-2) ? position[i] : Real(-2);  // NaN is outside too
    const Real clear = above < end ? above : end;
    const std::int32_t whole = std::int32_t(clear);
    const std::int32_t floor = whole - std::int32_t(Real(whole) > clear);
    low[i] = floor;
    high_share[i] = clear - Real(floor);
  }
  for (Index i = 0; i < count; ++i) {
    const std::int32_t floor = low[i], next = floor + 1, last = size[i] - 1;
    const std::int32_t low_place = std::min(std::max(floor, 0), last);
    const std::int32_t high_place = std::min(std::max(next, 0), last);
    low[i] = low_place;
    high[i] = high_place;
    low_inside[i] = Real(low_place == floor);
    high_inside[i] = Real(high_place == next);
  }
  for (Index i = 0; i < count; ++i) {
    low_share[i] = low_inside[i] * (1 - high_share[i]);
    high_share[i] = high_inside[i] * high_share[i];
  }
}

// Where the samples of one point lie. Numbers of an axis stand side by side, (y, x) on two axes, as offsets do: the
// pixels below and above, their shares, and 1 where they lie on the grid. A pixel outside it has a share of zero and
// is at the nearest place inside.
template <class Stored, class Real, int AXES>
struct Samples {
  std::vector<std::int32_t> size, low, high;
  std::vector<Real> tap, position, low_share, high_share, low_inside, high_inside, weight;
  Index taps;

  Samples(const Shape& shape, const Real* at, Real scale) : taps(shape.taps) {
    const Index count = shape.groups * shape.taps;
    for (auto* each : {&size, &low, &high}) each->resize(count * AXES);
    for (auto* each : {&tap, &position, &low_share, &high_share, &low_inside, &high_inside}) each->resize(count * AXES);
    weight.resize(count);
    for (Index i = 0; i < count * AXES; ++i) {
      size[i] = std::int32_t(AXES == 2 && i % 2 == 0 ? shape.rows : shape.columns);
      tap[i] = scale * at[i % (taps * AXES)];
    }
  }

  // Places the samples of the groups [from, to) of one point.
  void read(const Shape& shape, const Stored* offsets, const Stored* weights, const Real* base, Real scale, Index from,
            Index to) {
    const Real first = base[0], last = base[AXES - 1];
    for (Index group = from; group < to; ++group) {
      const Stored* __restrict offset = offsets + group * shape.offsets_group;
      const Stored* __restrict given = weights + group * shape.weights_group;
      const Real* __restrict steps = tap.data();
      Real* __restrict place = position.data() + (group - from) * taps * AXES;
      Real* __restrict factor = weight.data() + (group - from) * taps;
      for (Index i = 0; i < taps; ++i) {
        place[AXES * i] = first + steps[AXES * i] + scale * widen<Stored, Real>(offset[AXES * i]);
        if (AXES == 2) place[2 * i + 1] = last + steps[2 * i + 1] + scale * widen<Stored, Real>(offset[2 * i + 1]);
      }
      for (Index i = 0; i < taps; ++i) factor[i] = widen<Stored, Real>(given[i]);
    }
    settle(size.data(), position.data(), low.data(), high.data(), low_share.data(), high_share.data(),
           low_inside.data(), high_inside.data(), (to - from) * taps * AXES);
  }
};

// The corners of all samples of one point: the place of each in an image, and weight times share.
template <class Real, int AXES>
struct Corners {
  static constexpr int count = AXES == 2 ? 4 : 2;
  std::vector<Index> at[count];  // an image may have more than 2^31 numbers
  std::vector<Real> factor[count];

  explicit Corners(Index size) {
    for (int corner = 0; corner < count; ++corner) at[corner].resize(size), factor[corner].resize(size);
  }

  template <class Stored>
  void join(const Samples<Stored, Real, AXES>& samples, const Shape& shape) {
    const Index size = shape.groups * shape.taps;
    const Index channels = shape.channels, line = shape.columns * shape.channels;
    const Real* __restrict weight = samples.weight.data();
    for (int corner = 0; corner < count; ++corner) {
      const bool right = corner % 2, lower = corner / 2;
      const std::int32_t* __restrict x = (right ? samples.high : samples.low).data();
      const std::int32_t* __restrict y = (lower ? samples.high : samples.low).data();
      const Real* __restrict x_share = (right ? samples.high_share : samples.low_share).data();
      const Real* __restrict y_share = (lower ? samples.high_share : samples.low_share).data();
      Index* __restrict place = at[corner].data();
      Real* __restrict share = factor[corner].data();
      for (Index i = 0; i < size; ++i) {
        place[i] = x[AXES * i + AXES - 1] * channels + (AXES == 2 ? y[AXES * i] * line : 0);
        share[i] = weight[i] * x_share[AXES * i + AXES - 1] * (AXES == 2 ? y_share[AXES * i] : Real(1));
      }
    }
  }
};

template <class Stored, class Real, int AXES>
void forward(const Shape& shape, const Stored* value, const Stored* offsets, const Stored* weights, const Real* base,
             const Real* taps, Real scale, int threads, Stored* out) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count;
  constexpr int corners = Corners<Real, AXES>::count;
  const Index width = shape.channels / shape.groups, image_size = shape.rows * shape.columns * shape.channels;
#pragma omp parallel num_threads(threads)
  {
    Samples<Stored, Real, AXES> samples(shape, taps, scale);
    Corners<Real, AXES> joined(shape.groups * shape.taps);
#pragma omp for schedule(static)
    for (Index row = 0; row < shape.batch * shape.points; ++row) {
      const Index image = row / shape.points, point = row % shape.points;
      samples.read(shape, offsets + image * shape.offsets_image + point * shape.offsets_point,
                   weights + image * shape.weights_image + point * shape.weights_point, base + point * AXES, scale, 0,
                   shape.groups);
      joined.join(samples, shape);
      for (Index group = 0; group < shape.groups; ++group) {
        for (Index start = 0; start < width; start += lanes) {
          const int part = width - start < lanes ? int(width - start) : lanes;
          const Stored* from = value + image * image_size + group * width + start;
          Vector sums[corners] = {};  // one for each corner: they need not wait for each other
          auto taken = [&](int part) {
            for (Index i = group * shape.taps; i < (group + 1) * shape.taps; ++i)
              for (int corner = 0; corner < corners; ++corner)
                sums[corner] += joined.factor[corner][i] * load<Stored, Real>(from + joined.at[corner][i], part);
          };
          if (part == lanes) taken(lanes);
          else taken(part);
          Vector sum = sums[0] + sums[1];
          if (AXES == 2) sum += sums[corners - 2] + sums[corners - 1];
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
    const auto& at = samples;
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
          const Index x = AXES * i + AXES - 1, y = AXES * i;
          const Index left = at.low[x] * shape.channels, right = at.high[x] * shape.channels;
          const Index top = AXES == 2 ? at.low[y] * shape.columns * shape.channels : 0;
          const Index bottom = AXES == 2 ? at.high[y] * shape.columns * shape.channels : 0;
          const Real high = AXES == 2 ? at.low_share[y] : Real(1), low = AXES == 2 ? at.high_share[y] : Real(0);
          Vector by_weight = {}, by_y = {}, by_x = {};
          auto taken = [&](Index start, int part) {
            const Vector given = load<Stored, Real>(above + start, part);
            const Vector top_left = load<Stored, Real>(from + top + left + start, part);
            const Vector top_right = load<Stored, Real>(from + top + right + start, part);
            const Vector upper = at.low_share[x] * top_left + at.high_share[x] * top_right;
            const Vector upper_slope = at.high_inside[x] * top_right - at.low_inside[x] * top_left;
            const Vector share = weight * given;
            add<Real>(into + top + left + start, (high * at.low_share[x]) * share, part);
            add<Real>(into + top + right + start, (high * at.high_share[x]) * share, part);
            if (AXES == 2) {
              const Vector bottom_left = load<Stored, Real>(from + bottom + left + start, part);
              const Vector bottom_right = load<Stored, Real>(from + bottom + right + start, part);
              const Vector lower = at.low_share[x] * bottom_left + at.high_share[x] * bottom_right;
              const Vector lower_slope = at.high_inside[x] * bottom_right - at.low_inside[x] * bottom_left;
              by_weight += given * (high * upper + low * lower);
              by_y += given * (at.high_inside[y] * lower - at.low_inside[y] * upper);
              by_x += given * (high * upper_slope + low * lower_slope);
              add<Real>(into + bottom + left + start, (low * at.low_share[x]) * share, part);
              add<Real>(into + bottom + right + start, (low * at.high_share[x]) * share, part);
            } else {
              by_weight += given * upper;
              by_x += given * upper_slope;
            }
          };
          Index start = 0;
          for (; start + lanes <= width; start += lanes) taken(start, lanes);
          if (start < width) taken(start, int(width - start));
          const Index to = (row * shape.groups + group) * shape.taps + i;
          weights_gradient[to] = narrow<Stored, Real>(total<Real>(by_weight));
          if (AXES == 2) offsets_gradient[2 * to] = narrow<Stored, Real>(scale * weight * total<Real>(by_y));
          offsets_gradient[AXES * to + AXES - 1] = narrow<Stored, Real>(scale * weight * total<Real>(by_x));
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
