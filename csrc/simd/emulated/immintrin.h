// Stands in for the compiler's <immintrin.h> in the AVX-512 and AMX rows of a build with LLMFAST_EMULATE_ISA=1, so that
// a machine with AVX2 runs their code, instruction by instruction. Found first through -Icsrc/simd/emulated.
//
// The names below are the intrinsics that llmfast may use on 512-bit registers; one that is missing fails to compile
// with "target specific option mismatch": add it here and to avx512.h, with the semantics of Intel's manual.
#pragma once
#include_next <immintrin.h>

#ifndef LLMFAST_EMULATED
#error "csrc/simd/emulated is only for builds with LLMFAST_EMULATE_ISA=1; see setup.py"
#endif

#include "simd/emulated/avx512.h"

#undef _mm512_set_ps
#undef _mm512_setr_ps
#undef _mm512_setr_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_epi32_mask
#undef _mm512_roundscale_ps
#undef _mm512_cvtps_ph

#define LLMFAST_EMU ::llmfast::LLMFAST_TARGET::emulated

// Constants and casts.
#define _mm512_setzero_ps LLMFAST_EMU::setzero_ps
#define _mm512_setzero_si512 LLMFAST_EMU::setzero_si512
#define _mm512_set1_ps LLMFAST_EMU::set1_ps
#define _mm512_set1_epi16 LLMFAST_EMU::set1_epi16
#define _mm512_set1_epi32 LLMFAST_EMU::set1_epi32
#define _mm512_set1_epi64 LLMFAST_EMU::set1_epi64
#define _mm512_setr_ps LLMFAST_EMU::setr_ps
#define _mm512_set_ps LLMFAST_EMU::set_ps
#define _mm512_setr_epi32 LLMFAST_EMU::setr_epi32
#define _mm512_set_epi32 LLMFAST_EMU::set_epi32
#define _mm512_set_epi16 LLMFAST_EMU::set_epi16
#define _mm512_castps_si512 LLMFAST_EMU::castps_si512
#define _mm512_castsi512_ps LLMFAST_EMU::castsi512_ps
#define _mm512_castps512_ps256 LLMFAST_EMU::low_half
#define _mm512_castsi512_si256 LLMFAST_EMU::low_half
#define _mm512_castps256_ps512 LLMFAST_EMU::garbage_above
#define _mm512_castsi256_si512 LLMFAST_EMU::garbage_above
#define _mm512_zextps256_ps512 LLMFAST_EMU::zero_above
#define _mm512_zextsi256_si512 LLMFAST_EMU::zero_above
#define _mm512_extracti64x4_epi64 LLMFAST_EMU::extract_half
#define _mm512_extractf32x8_ps LLMFAST_EMU::extract_half
#define _mm512_inserti64x4 LLMFAST_EMU::insert_half
#define _mm512_insertf32x8 LLMFAST_EMU::insert_half
#define _mm512_cvtss_f32(a) ((a)[0])

// Memory.
#define _mm512_loadu_ps LLMFAST_EMU::load_unaligned<__m512>
#define _mm512_loadu_si512 LLMFAST_EMU::load_unaligned<__m512i>
#define _mm512_load_ps LLMFAST_EMU::load_aligned<__m512>
#define _mm512_load_si512 LLMFAST_EMU::load_aligned<__m512i>
#define _mm512_stream_load_si512 LLMFAST_EMU::load_aligned<__m512i>
#define _mm512_storeu_ps LLMFAST_EMU::store_unaligned<__m512>
#define _mm512_storeu_si512 LLMFAST_EMU::store_unaligned<__m512i>
#define _mm512_store_ps LLMFAST_EMU::store_aligned<__m512>
#define _mm512_store_si512 LLMFAST_EMU::store_aligned<__m512i>
#define _mm512_stream_ps LLMFAST_EMU::store_aligned<__m512>
#define _mm512_stream_si512 LLMFAST_EMU::store_aligned<__m512i>
#define _mm512_maskz_loadu_ps LLMFAST_EMU::load_masked<__m512, float>
#define _mm512_maskz_loadu_epi32 LLMFAST_EMU::load_masked<__m512i, int>
#define _mm512_maskz_loadu_epi16 LLMFAST_EMU::load_masked<__m512i, short>
#define _mm256_maskz_loadu_epi16 LLMFAST_EMU::load_masked<__m256i, short>
#define _mm512_mask_storeu_ps LLMFAST_EMU::store_masked<float>
#define _mm512_mask_storeu_epi32 LLMFAST_EMU::store_masked<int>
#define _mm512_mask_storeu_epi16 LLMFAST_EMU::store_masked<short>
#define _mm256_mask_storeu_epi16 LLMFAST_EMU::store_masked<short>

// Float arithmetic.
#define _mm512_add_ps LLMFAST_EMU::add_ps
#define _mm512_sub_ps LLMFAST_EMU::sub_ps
#define _mm512_mul_ps LLMFAST_EMU::mul_ps
#define _mm512_div_ps LLMFAST_EMU::div_ps
#define _mm512_fmadd_ps LLMFAST_EMU::fmadd_ps
#define _mm512_fmsub_ps LLMFAST_EMU::fmsub_ps
#define _mm512_fnmadd_ps LLMFAST_EMU::fnmadd_ps
#define _mm512_fnmsub_ps LLMFAST_EMU::fnmsub_ps
#define _mm512_max_ps LLMFAST_EMU::max_ps
#define _mm512_min_ps LLMFAST_EMU::min_ps
#define _mm512_abs_ps LLMFAST_EMU::abs_ps
#define _mm512_sqrt_ps LLMFAST_EMU::sqrt_ps
#define _mm512_rcp14_ps LLMFAST_EMU::rcp14_ps
#define _mm512_rsqrt14_ps LLMFAST_EMU::rsqrt14_ps
#define _mm512_scalef_ps LLMFAST_EMU::scalef_ps
#define _mm512_roundscale_ps(a, imm) LLMFAST_EMU::roundscale_ps<imm>(a)
#define _mm512_reduce_add_ps LLMFAST_EMU::reduce_add_ps
#define _mm512_reduce_max_ps LLMFAST_EMU::reduce_max_ps
#define _mm512_reduce_min_ps LLMFAST_EMU::reduce_min_ps

// Integer arithmetic.
#define _mm512_add_epi32 LLMFAST_EMU::add_epi32
#define _mm512_sub_epi32 LLMFAST_EMU::sub_epi32
#define _mm512_mullo_epi32 LLMFAST_EMU::mullo_epi32
#define _mm512_max_epi32 LLMFAST_EMU::max_epi32
#define _mm512_min_epi32 LLMFAST_EMU::min_epi32
#define _mm512_slli_epi32 LLMFAST_EMU::slli_epi32
#define _mm512_srli_epi32 LLMFAST_EMU::srli_epi32
#define _mm512_srai_epi32 LLMFAST_EMU::srai_epi32
#define _mm512_and_si512 LLMFAST_EMU::and_si512
#define _mm512_or_si512 LLMFAST_EMU::or_si512
#define _mm512_xor_si512 LLMFAST_EMU::xor_si512
#define _mm512_andnot_si512 LLMFAST_EMU::andnot_si512
#define _mm512_and_epi32 LLMFAST_EMU::and_si512
#define _mm512_or_epi32 LLMFAST_EMU::or_si512
#define _mm512_xor_epi32 LLMFAST_EMU::xor_si512

// Comparisons and masks.
#define _mm512_cmp_ps_mask(a, b, predicate) LLMFAST_EMU::cmp_ps_mask<predicate>(a, b)
#define _mm512_cmp_epi32_mask LLMFAST_EMU::cmp_epi32_mask
#define _mm512_cmpeq_epi32_mask(a, b) LLMFAST_EMU::cmp_epi32_mask(a, b, _MM_CMPINT_EQ)
#define _mm512_cmplt_epi32_mask(a, b) LLMFAST_EMU::cmp_epi32_mask(a, b, _MM_CMPINT_LT)
#define _mm512_cmple_epi32_mask(a, b) LLMFAST_EMU::cmp_epi32_mask(a, b, _MM_CMPINT_LE)
#define _mm512_cmpgt_epi32_mask(a, b) LLMFAST_EMU::cmp_epi32_mask(a, b, _MM_CMPINT_NLE)
#define _mm512_cmpge_epi32_mask(a, b) LLMFAST_EMU::cmp_epi32_mask(a, b, _MM_CMPINT_NLT)
#define _mm512_cmpneq_epi32_mask(a, b) LLMFAST_EMU::cmp_epi32_mask(a, b, _MM_CMPINT_NE)
#define _mm512_mask_blend_ps LLMFAST_EMU::blend<__m512, float>
#define _mm512_mask_blend_epi32 LLMFAST_EMU::blend<__m512i, int>
#define _mm512_mask_blend_epi16 LLMFAST_EMU::blend<__m512i, short>
#define _mm512_maskz_mov_ps(mask, a) LLMFAST_EMU::blend<__m512, float>(mask, LLMFAST_EMU::setzero_ps(), a)
#define _mm512_mask_mov_ps(from, mask, a) LLMFAST_EMU::blend<__m512, float>(mask, from, a)
#define _mm512_maskz_mov_epi32(mask, a) LLMFAST_EMU::blend<__m512i, int>(mask, LLMFAST_EMU::setzero_si512(), a)
#define _mm512_mask_mov_epi32(from, mask, a) LLMFAST_EMU::blend<__m512i, int>(mask, from, a)
#define _mm512_mask_add_ps(from, mask, a, b) _mm512_mask_mov_ps(from, mask, LLMFAST_EMU::add_ps(a, b))
#define _mm512_mask_sub_ps(from, mask, a, b) _mm512_mask_mov_ps(from, mask, LLMFAST_EMU::sub_ps(a, b))
#define _mm512_mask_mul_ps(from, mask, a, b) _mm512_mask_mov_ps(from, mask, LLMFAST_EMU::mul_ps(a, b))
#define _mm512_mask_max_ps(from, mask, a, b) _mm512_mask_mov_ps(from, mask, LLMFAST_EMU::max_ps(a, b))
#define _mm512_maskz_mul_ps(mask, a, b) _mm512_maskz_mov_ps(mask, LLMFAST_EMU::mul_ps(a, b))
#define _mm512_maskz_sub_ps(mask, a, b) _mm512_maskz_mov_ps(mask, LLMFAST_EMU::sub_ps(a, b))

// Lanes moved about.
#define _mm512_unpacklo_ps LLMFAST_EMU::unpack<__m512, float, 0>
#define _mm512_unpackhi_ps LLMFAST_EMU::unpack<__m512, float, 1>
#define _mm512_unpacklo_epi16 LLMFAST_EMU::unpack<__m512i, short, 0>
#define _mm512_unpackhi_epi16 LLMFAST_EMU::unpack<__m512i, short, 1>
#define _mm512_unpacklo_epi32 LLMFAST_EMU::unpack<__m512i, int, 0>
#define _mm512_unpackhi_epi32 LLMFAST_EMU::unpack<__m512i, int, 1>
#define _mm512_unpacklo_epi64 LLMFAST_EMU::unpack<__m512i, long long, 0>
#define _mm512_unpackhi_epi64 LLMFAST_EMU::unpack<__m512i, long long, 1>
#define _mm512_shuffle_ps LLMFAST_EMU::shuffle_ps
#define _mm512_shuffle_f32x4 LLMFAST_EMU::shuffle_quarters<__m512>
#define _mm512_broadcast_i32x4 LLMFAST_EMU::broadcast_quarter
#define _mm512_mask_broadcast_i32x4 LLMFAST_EMU::mask_broadcast_quarter
#define _mm512_permutexvar_ps LLMFAST_EMU::permute<__m512, float>
#define _mm512_permutexvar_epi32 LLMFAST_EMU::permute<__m512i, int>
#define _mm512_permutexvar_epi16 LLMFAST_EMU::permute<__m512i, short>
#define _mm512_permutex2var_ps LLMFAST_EMU::permute2<__m512, float>
#define _mm512_permutex2var_epi32 LLMFAST_EMU::permute2<__m512i, int>
#define _mm512_permutex2var_epi16 LLMFAST_EMU::permute2<__m512i, short>

// Conversions.
#define _mm512_cvtepu16_epi32 LLMFAST_EMU::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 LLMFAST_EMU::cvtepi8_epi32
#define _mm512_cvtepi32_epi16 LLMFAST_EMU::cvtepi32_epi16
#define _mm512_cvtepi32_ps LLMFAST_EMU::cvtepi32_ps
#define _mm512_cvtps_epi32 LLMFAST_EMU::cvtps_epi32
#define _mm512_cvtph_ps LLMFAST_EMU::cvtph_ps
#define _mm512_cvtps_ph(a, imm) LLMFAST_EMU::cvtps_ph<imm>(a)

// AVX512_BF16.
#define _mm512_cvtneps_pbh LLMFAST_EMU::cvtneps_pbh
#define _mm512_cvtne2ps_pbh LLMFAST_EMU::cvtne2ps_pbh
#define _mm512_cvtpbh_ps LLMFAST_EMU::cvtpbh_ps
#define _mm512_dpbf16_ps LLMFAST_EMU::dpbf16_ps
