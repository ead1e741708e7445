// Vectors of fp32 as wide as the compiler's target has them (AVX-512, AVX2, or 4 lanes), and what all kernels do with them.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef uint16_t hvec __attribute__((vector_size(VL * 2)));
typedef _Float16 f16vec __attribute__((vector_size(VL * 2)));
typedef vec vec_u __attribute__((aligned(4), may_alias));
typedef ivec ivec_u __attribute__((aligned(4), may_alias));
typedef int8_t bvec __attribute__((vector_size(VL)));
typedef hvec hvec_u __attribute__((aligned(2), may_alias));
typedef bvec bvec_u __attribute__((aligned(1), may_alias));

constexpr int LINE = 16;  // floats of a cache line

inline vec splat(float x) { return vec{} + x; }
inline ivec splat(int32_t x) { return ivec{} + x; }
inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
inline ivec load(const int32_t* p) { return *reinterpret_cast<const ivec_u*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_u*>(p) = x; }
inline void store(int32_t* p, ivec x) { *reinterpret_cast<ivec_u*>(p) = x; }
// sum + a · b, rounded once where the processor can. Written out, for in some chains of such sums, and for some processors
// (Zen 2 and 3), GCC takes product and sum apart: two shapes of a tile would round differently.
inline vec fused(vec sum, vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

inline vec vmax(vec a, vec b) { return a > b ? a : b; }

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline bool any(ivec mask) {
  int32_t found = 0;
  for (int i = 0; i < VL; i++) found |= mask[i];
  return found;
}

inline ivec lanes() {
  alignas(64) static constexpr int32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(NUMBERS);
}

// All lanes by an operation of two vectors that knows no order.
template <class Operation>
inline int32_t fold(ivec x, const Operation& of) {
  for (int step = 1; step < VL; step *= 2) x = of(x, __builtin_shuffle(x, lanes() ^ step));
  return x[0];
}

// Lane j of vector i and lane i of vector j change places.
inline void transpose(vec (&x)[VL]) {
  for (int step = 1; step < VL; step *= 2) {
    const ivec own = lanes(), other = own + VL - step;
    const ivec low = own & step ? other : own, high = own & step ? own + VL : own + step;
    for (int i = 0; i < VL; i++) {
      if (i & step) continue;
      const vec a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, low), x[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// ---- VL narrow values, widened and back; written out because GCC 12 makes __builtin_convertvector of them one at a time ----

inline vec to_floats(ivec x) { return __builtin_convertvector(x, vec); }

#if defined(__AVX512F__)
inline ivec load_int8(const char* p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u*)p)); }
inline ivec load_uint8(const char* p) { return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i_u*)p)); }
inline ivec load_uint16(const char* p) { return (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u*)p)); }
inline vec load_fp16(const char* p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u*)p)); }
inline ivec nearest(vec x) { return (ivec)_mm512_cvtps_epi32((__m512)x); }  // ties to even
inline void store_int8(char* p, ivec x) { _mm_storeu_si128((__m128i_u*)p, _mm512_cvtepi32_epi8((__m512i)x)); }
#elif defined(__AVX2__) && defined(__F16C__)
inline ivec load_int8(const char* p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u*)p)); }
inline ivec load_uint8(const char* p) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i_u*)p)); }
inline ivec load_uint16(const char* p) { return (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u*)p)); }
inline vec load_fp16(const char* p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u*)p)); }
inline ivec nearest(vec x) { return (ivec)_mm256_cvtps_epi32((__m256)x); }
inline void store_int8(char* p, ivec x) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i_u*)p, _mm_packs_epi16(halves, halves));
}
#else
typedef uint8_t ubvec __attribute__((vector_size(VL)));
typedef ubvec ubvec_u __attribute__((aligned(1), may_alias));
inline ivec load_int8(const char* p) { return __builtin_convertvector(*reinterpret_cast<const bvec_u*>(p), ivec); }
inline ivec load_uint8(const char* p) { return __builtin_convertvector(*reinterpret_cast<const ubvec_u*>(p), ivec); }
inline ivec load_uint16(const char* p) { return __builtin_convertvector(*reinterpret_cast<const hvec_u*>(p), ivec); }
inline vec load_fp16(const char* p) { return __builtin_convertvector((f16vec)*reinterpret_cast<const hvec_u*>(p), vec); }
inline ivec nearest(vec x) {
  ivec rounded;
  for (int i = 0; i < VL; i++) rounded[i] = std::lrint(x[i]);
  return rounded;
}
inline void store_int8(char* p, ivec x) { *reinterpret_cast<bvec_u*>(p) = __builtin_convertvector(x, bvec); }
#endif

constexpr float MAGIC = 12582912.f;  // 1.5 · 2^23: adding it rounds to a whole number, which the low bits then hold

inline vec whole(vec x) { return x + splat(MAGIC) - splat(MAGIC); }

// 2^(x - m) for a whole m ≥ x - 1/2, relative error < 2e-7; exactly zero where it would be below 2^-126.
// m enters the exponent alone: 2^(x - m) and 2^(x - m') differ by exactly a power of two.
inline vec exp2v(vec x, vec m) {
  const ivec normal = x >= m - splat(126.f);
  vec shifted = x + splat(MAGIC);
  vec f = x - (shifted - splat(MAGIC));
  vec p = splat(1.5353362e-4f);
  p = p * f + splat(1.3398874e-3f);
  p = p * f + splat(9.6184370e-3f);
  p = p * f + splat(5.5503324e-2f);
  p = p * f + splat(2.4022648e-1f);
  p = p * f + splat(6.9314718e-1f);
  p = p * f + splat(1.f);
  return (vec)(((ivec)p + (((ivec)shifted - (ivec)(m + splat(MAGIC))) << 23)) & normal);
}

// ---- bf16: the high half of an fp32 value, rounded to the nearest, ties to even, as torch rounds ----

constexpr int32_t HIGH = ~0xffff;

// The rounded value lies in the high half of each lane; what is in the low half means nothing.
inline ivec round_number(vec x) { return (ivec)x + 0x7fff + (((ivec)x >> 16) & 1); }  // x is not NaN
inline ivec round_bf16(vec x) { return x == x ? round_number(x) : (ivec)x | 0x400000; }

inline uint32_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

// Two rounded values to a cell of 32 bits, the first in the low half.
inline ivec pair(ivec first, ivec second) { return (ivec)((uvec)first >> 16) | (second & HIGH); }
inline int32_t pair(uint32_t first, uint32_t second) { return first >> 16 | (second & HIGH); }

// The same of values that are rounded here.
inline ivec pair(vec first, vec second) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t ZIP[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (ivec)_mm512_permutexvar_epi16(_mm512_load_si512(ZIP), both);
#else
  return pair(round_bf16(first), round_bf16(second));
#endif
}

// VL values in order, as VL / 2 cells.
inline void store_bf16(int32_t* cells, vec x) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<hvec_u*>(cells) = (hvec)_mm512_cvtneps_pbh((__m512)x);
#else
  *reinterpret_cast<hvec_u*>(cells) = __builtin_convertvector((uvec)round_bf16(x) >> 16, hvec);
#endif
}

}  // namespace
