// SPDX-License-Identifier: Apache-2.0
// Every rule once: X(name in Python, type). CPU and CUDA instantiate their loops from these lists.
#pragma once

#include "rules/adabelief.h"
#include "rules/adadelta.h"
#include "rules/adafactor.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/adan.h"
#include "rules/ademamix.h"
#include "rules/adopt.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/mars.h"
#include "rules/nadam.h"
#include "rules/prodigy.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/schedule_free.h"
#include "rules/sgd.h"
#include "rules/signum.h"
#include "rules/sophia_g.h"
#include "rules/stable_adamw.h"

#define OPTKIT_FOR_EACH_RULE(X)                         \
  X(sgd, optkit::SGDRule)                               \
  X(adam, optkit::AdamRule<false>)                      \
  X(adam_amsgrad, optkit::AdamRule<true>)               \
  X(adagrad, optkit::AdagradRule)                       \
  X(rmsprop, optkit::RMSpropRule)                       \
  X(adadelta, optkit::AdadeltaRule)                     \
  X(adamax, optkit::AdamaxRule)                         \
  X(nadam, optkit::NAdamRule)                           \
  X(radam, optkit::RAdamRule)                           \
  X(lion, optkit::LionRule)                             \
  X(adan, optkit::AdanRule)                             \
  X(adopt, optkit::ADOPTRule)                           \
  X(ademamix, optkit::AdEMAMixRule)                     \
  X(schedule_free_sgd, optkit::ScheduleFreeSGDRule)     \
  X(schedule_free_adamw, optkit::ScheduleFreeAdamWRule) \
  X(lamb, optkit::LAMBRule)                             \
  X(lars, optkit::LARSRule)                             \
  X(prodigy, optkit::ProdigyRule)                       \
  X(adabelief, optkit::AdaBeliefRule)                   \
  X(signum, optkit::SignumRule)                         \
  X(sophia_g, optkit::SophiaGRule)                      \
  X(mars, optkit::MARSRule)                             \
  X(stable_adamw, optkit::StableAdamWRule)

// Including the rules that only the CPU has.
#define OPTKIT_FOR_EACH_CPU_RULE(X) \
  OPTKIT_FOR_EACH_RULE(X)           \
  X(adafactor, optkit::AdafactorRule)

namespace optkit {

enum RuleId : int32_t {
#define OPTKIT_RULE_ID(name, type) kRule_##name,
  OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_RULE_ID)
#undef OPTKIT_RULE_ID
      kNumRules
};

#define OPTKIT_COUNT(name, type) +1
constexpr int kNumCudaRules = 0 OPTKIT_FOR_EACH_RULE(OPTKIT_COUNT);
#undef OPTKIT_COUNT

// Their names in the order of their numbers: a library of another build may have others.
#define OPTKIT_NAME(name, type) #name " "
constexpr char kCudaRuleNames[] = OPTKIT_FOR_EACH_RULE(OPTKIT_NAME);
#undef OPTKIT_NAME

}  // namespace optkit
