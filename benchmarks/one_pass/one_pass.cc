// One pass of AdamaxW over a tree of parameters, as a handler of XLA's FFI for the CPU.
//
// Parameters and moments are updated in place (the caller aliases inputs and outputs); everything
// of one element is read once and written once. The formulas are those of src/adamaxw/_rule.py,
// _formats.py and _rounding.py, in float32.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Elements of a task: large enough to hide what handing it out costs, small enough to balance.
constexpr int64_t kTask = 1 << 16;

struct Scalars {
  float rate, decay, one_minus_b1, one_minus_b2, eps, scale, new_scale;
};

uint32_t Mix(uint32_t x, uint32_t key = 0) {
  x = (x ^ (x >> 17)) * 0xED5AD4BBu;
  x = ((x ^ (x >> 11)) + key) * 0xAC4C1B51u;
  x = (x ^ (x >> 15)) * 0x31848BABu;
  return x ^ (x >> 14);
}

struct Noise {
  uint32_t key, other_key;

  Noise(int32_t count, uint32_t leaf) {
    key = Mix(static_cast<uint32_t>(count) + Mix(leaf + 0x9E3779B9u));
    other_key = Mix(key ^ 0x85EBCA6Bu);
  }
  uint32_t At(uint32_t index) const { return Mix(index ^ key, other_key) >> 16; }
};

template <typename To, typename From>
To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// NaN of either operand comes through, as in jnp.maximum.
float Maximum(float a, float b) { return a >= b || a != a ? a : b; }

bool IsFinite(float x) { return (Bits<uint32_t>(x) & 0x7F800000u) != 0x7F800000u; }

// Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits.
constexpr float kMagic = 3 << 22;
constexpr int32_t kMagicBits = 0x4B400000;

int32_t RoundToInt(float x) { return Bits<int32_t>(x + kMagic) - kMagicBits; }

constexpr int32_t kMantissa = (1 << 23) - 1, kOne = 127 << 23;

float Mantissa(int32_t bits) { return Bits<float>((bits & kMantissa) | kOne); }

float ClipFinite(float x) {
  constexpr float kLimit = 0x1p126f;
  float clipped = std::min(std::max(x, -kLimit), kLimit);
  return IsFinite(x) ? clipped : x;
}

uint16_t NearestBFloat16(float x) {
  uint32_t bits = Bits<uint32_t>(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u | ((bits >> 16) & 0x8000u) : rounded);
}

uint16_t NoisyBFloat16(float x, uint32_t noise) {
  uint32_t high = (Bits<uint32_t>(x) + noise) >> 16;
  bool finite = IsFinite(x) && (high & 0x7F80u) != 0x7F80u;
  return finite ? static_cast<uint16_t>(high) : NearestBFloat16(x);
}

void Next(float g, const Scalars& s, float& m, float& u) {
  m = s.one_minus_b1 * g + (m - s.one_minus_b1 * m);
  u = Maximum(u - s.one_minus_b2 * u, __builtin_fabsf(g) + s.eps);
}

struct Wide {
  using Mu = float;
  using Nu = float;

  Wide(const Scalars&, const Noise&) {}
  void Decode(Mu mu, Nu nu, float& m, float& u) const { m = mu, u = nu; }
  void Encode(float m, float u, uint32_t, Mu& mu, Nu& nu) const { mu = m, nu = u; }
  void Step(float g, uint32_t index, const Scalars& s, Mu& mu, Nu& nu) const {
    float m, u;
    Decode(mu, nu, m, u);
    Next(g, s, m, u);
    Encode(m, u, index, mu, nu);
  }
  float Ratio(Mu mu, Nu nu) const { return mu / nu; }
};

struct BFloat16 {
  using Mu = uint16_t;
  using Nu = uint16_t;
  float scale, new_scale, inverse;
  Noise noise;

  BFloat16(const Scalars& s, const Noise& n)
      : scale(s.scale), new_scale(s.new_scale), inverse(1 / s.new_scale), noise(n) {}
  static float Float(uint16_t x) { return Bits<float>(static_cast<uint32_t>(x) << 16); }
  void Decode(Mu mu, Nu nu, float& m, float& u) const { m = Float(mu), u = Float(nu) * scale; }
  void Encode(float m, float u, uint32_t index, Mu& mu, Nu& nu) const {
    mu = NoisyBFloat16(ClipFinite(m), noise.At(index));
    nu = NearestBFloat16(ClipFinite(u) * inverse);
  }
  void Step(float g, uint32_t index, const Scalars& s, Mu& mu, Nu& nu) const {
    float m, u;
    Decode(mu, nu, m, u);
    Next(g, s, m, u);
    Encode(m, u, index, mu, nu);
  }
  float Ratio(Mu mu, Nu nu) const { return Float(mu) / (Float(nu) * new_scale); }
};

struct Logarithmic {
  using Mu = int8_t;
  using Nu = uint8_t;
  static constexpr float kLevels = 6, kSquare = 127 * 127, kUnit = 1.25 / (127 * 127);
  static constexpr int32_t kStep = 1398101;  // 2^23 / kLevels
  float unit, eps, of_new, of_old, largest, bound;
  int32_t fall;
  Noise noise;

  Logarithmic(const Scalars& s, const Noise& n)
      : unit(static_cast<float>(std::exp2((0.5 - 127) / 6)) / s.new_scale),
        eps(s.eps * unit),
        of_new(s.one_minus_b1 * (static_cast<float>(127 * 127 / 1.25) / s.new_scale)),
        largest(s.new_scale * static_cast<float>(std::exp2(255 / 6.0))),
        bound(IsFinite(s.scale) ? __builtin_inff() : 0), noise(n) {
    float steps = kLevels * std::log2(s.new_scale / (s.scale - s.one_minus_b2 * s.scale));
    fall = static_cast<int32_t>(std::nearbyint(std::clamp(steps, -255.0f, 255.0f)));
    float since = s.scale / (s.new_scale * std::exp2(-static_cast<float>(fall) / kLevels));
    of_old = since - s.one_minus_b1 * since;
  }
  static int32_t Level(float u) {
    float cube = u * u * u;
    return Bits<uint32_t>(cube * cube) >> 23;
  }
  static float Power(int32_t n) {
    int32_t bits = n * kStep + (kOne + 96);
    float z = Mantissa(bits);
    float y = ((0.07358816f * z + 0.01027734f) * z + 0.45312125f) * z + 0.4630053f;
    return y * Bits<float>(bits & ~kMantissa);
  }
  static float Square(Mu mu) {
    float q = mu;
    return q * __builtin_fabsf(q);
  }
  int32_t Compress(float square, uint32_t index) const {
    float size = __builtin_fabsf(square);
    size = size < kSquare ? size : kSquare;
    float d = static_cast<int32_t>(noise.At(index)) * -0x1p-16f + (0.5f - 0x1p-17f);
    float lower = size + (d * d - 0.25f);
    float root = __builtin_sqrtf(lower > 0 ? lower : 0) + d;
    return RoundToInt(Bits<float>(Bits<int32_t>(root) | (Bits<int32_t>(square) & INT32_MIN)));
  }
  void Step(float g, uint32_t index, const Scalars& s, Mu& mu, Nu& nu) const {
    int32_t fallen = std::min(nu - fall, 255);
    float size = __builtin_fabsf(g);
    int32_t risen = std::max(Level(size * unit + eps), fallen);
    float clipped = __builtin_copysignf(size < largest ? size : largest, g);
    float m = clipped * of_new * Power(-fallen) + Square(mu) * of_old;
    int32_t code = Compress(m * Power(fallen - risen), index);
    code = size < bound ? code : -128;
    mu = mu == -128 ? mu : static_cast<Mu>(code);
    nu = mu == -128 ? 255 : static_cast<Nu>(risen);
  }
  float Ratio(Mu mu, Nu) const {
    return mu == -128 ? __builtin_nanf("") : Square(mu) * kUnit;
  }
};

// One leaf of the tree, or a part of one from element `first` on.
struct Piece {
  float* p;
  void* mu;
  void* nu;
  const float* g;
  int64_t first, size;
  uint32_t leaf;
};

template <typename Format>
void Step(const Piece& piece, const Scalars& s, int32_t count) {
  const Format format(s, Noise(count, piece.leaf));
  // No two of the arrays overlap: XLA aliases an output only with its own input.
  float* __restrict p = piece.p + piece.first;
  auto* __restrict mu = static_cast<typename Format::Mu*>(piece.mu) + piece.first;
  auto* __restrict nu = static_cast<typename Format::Nu*>(piece.nu) + piece.first;
  const float* __restrict g = piece.g + piece.first;
  const uint32_t first = static_cast<uint32_t>(piece.first);
  const int32_t size = static_cast<int32_t>(piece.size);
  for (int32_t i = 0; i < size; ++i) {
    typename Format::Mu new_mu = mu[i];
    typename Format::Nu new_nu = nu[i];
    format.Step(g[i], first + static_cast<uint32_t>(i), s, new_mu, new_nu);
    mu[i] = new_mu, nu[i] = new_nu;
    p[i] += -s.rate * format.Ratio(new_mu, new_nu) - s.decay * p[i];
  }
}

// The same traffic with hardly any arithmetic: the least time that one pass can take.
void Touch(const Piece& piece, const Scalars&, int32_t) {
  float* __restrict p = piece.p + piece.first;
  float* __restrict mu = static_cast<float*>(piece.mu) + piece.first;
  float* __restrict nu = static_cast<float*>(piece.nu) + piece.first;
  const float* __restrict g = piece.g + piece.first;
  for (int64_t i = 0; i < piece.size; ++i) p[i] -= g[i], mu[i] -= g[i], nu[i] -= g[i];
}

void Copy(const Piece& piece, const Scalars&, int32_t) {
  std::memcpy(piece.p + piece.first, piece.g + piece.first, piece.size * sizeof(float));
}

using Kernel = void (*)(const Piece&, const Scalars&, int32_t);

// The kernels, by the attribute `kernel`.
constexpr Kernel kKernels[] = {Step<Wide>, Step<BFloat16>, Step<Logarithmic>, Touch, Copy};
constexpr int64_t kBytes[] = {4, 2, 1, 4, 4};  // of one moment

// Work that any thread may take from. The caller takes too, so it ends even if no other thread of
// the pool is free; a thread that comes late finds nothing, and keeps this alive while it looks.
struct Work {
  std::vector<Piece> pieces;
  Scalars scalars;
  int32_t count;
  Kernel kernel;
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::condition_variable done;
  size_t finished = 0;

  void Take() {
    size_t mine = 0;
    for (size_t i; (i = next.fetch_add(1)) < pieces.size(); ++mine) {
      kernel(pieces[i], scalars, count);
    }
    if (mine == 0) return;
    std::lock_guard lock(mutex);
    finished += mine;
    if (finished == pieces.size()) done.notify_all();
  }
};

// Operands: scalars (float32[7]), count (int32), then p, mu and nu of all leaves, which the results
// alias, then g of all leaves.
ffi::Error OnePass(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   int64_t kernel, int64_t first_leaf) {
  const size_t leaves = rets.size() / 3;
  if (rets.size() != 3 * leaves || args.size() != 2 + 4 * leaves) {
    return ffi::Error::InvalidArgument("scalars, count, and p, mu, nu, g of each leaf");
  }
  auto work = std::make_shared<Work>();
  work->kernel = kKernels[kernel];
  std::memcpy(&work->scalars, args.get<ffi::AnyBuffer>(0)->untyped_data(), sizeof(Scalars));
  std::memcpy(&work->count, args.get<ffi::AnyBuffer>(1)->untyped_data(), sizeof(int32_t));
  for (size_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t size = args.get<ffi::AnyBuffer>(2 + leaf)->element_count();
    void* out[3];
    for (size_t k = 0; k < 3; ++k) {
      auto from = *args.get<ffi::AnyBuffer>(2 + k * leaves + leaf);
      out[k] = (*rets.get<ffi::AnyBuffer>(k * leaves + leaf))->untyped_data();
      // XLA copies what is not donated, and the result is then a buffer of its own.
      if (out[k] != from.untyped_data()) {
        std::memcpy(out[k], from.untyped_data(), size * (k == 0 ? 4 : kBytes[kernel]));
      }
    }
    auto* g = static_cast<const float*>(args.get<ffi::AnyBuffer>(2 + 3 * leaves + leaf)
                                            ->untyped_data());
    for (int64_t first = 0; first < size; first += kTask) {
      work->pieces.push_back({static_cast<float*>(out[0]), out[1], out[2], g, first,
                              std::min(kTask, size - first),
                              static_cast<uint32_t>(first_leaf + leaf)});
    }
  }
  const int64_t helpers =
      std::min<int64_t>(pool.num_threads(), static_cast<int64_t>(work->pieces.size())) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([work] { work->Take(); });
  }
  work->Take();
  std::unique_lock lock(work->mutex);
  work->done.wait(lock, [&] { return work->finished == work->pieces.size(); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(adamaxw_one_pass, OnePass,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("kernel")
                                  .Attr<int64_t>("first_leaf"));
